"""Counts in one key, by compare-and-set, with several writers at a time, and follows what they write.

Whichever node fails meanwhile, each addition is made once, and the follower is told of every value:

    python3 counter.py --nodes 127.0.0.1:21001,127.0.0.1:21002,127.0.0.1:21003 --writers 4 --adds 100

It prints a line for each value that it is told of, and at the end how many additions were
acknowledged. rkv.py is the client.
"""
import argparse
import asyncio
import signal
import sys

import rkv


class Printer(rkv.Follower):
    """Prints what the counter is, and each value that it gets."""

    def __init__(self, key):
        self.key = key
        self.version = 0  # of the last value
        self.told = asyncio.Event()  # of another one

    def begin(self, keys, version):
        for k in keys:
            if k.key == self.key:
                self.tell("begins", k)

    def change(self, events):
        for e in events:
            if e.key == self.key:  # and not another key with this prefix
                self.tell("is", e)

    def tell(self, what, entry):
        print(what, entry.value.decode(), "of version", entry.version, flush=True)
        self.version = entry.version
        self.told.set()

    async def until(self, version):
        """Waits for the value of a version."""
        while self.version < version:
            self.told.clear()
            await self.told.wait()

    def fail(self, err):
        text = f"{err.code().name}: {err.details()}" if isinstance(err, rkv.grpc.aio.AioRpcError) else "silence"
        print("counter: goes on at another node:", text, file=sys.stderr, flush=True)


def add_one(old):
    return b"%d" % (int(old or b"0") + 1)


async def add(session, key, adds, stopping):
    """Adds 1 as often as a writer is to. Returns how often, and the version of the last addition."""
    count = version = 0
    while (adds == 0 or count < adds) and not stopping.is_set():
        _, version = await session.update(key, add_one)
        count += 1
    return count, version


async def run(args):
    stopping = asyncio.Event()
    for s in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(s, stopping.set)
    config = rkv.Config(args.nodes.split(","), args.cert, args.key_file, args.ca, args.name)
    printer = Printer(args.counter)
    async with asyncio.TaskGroup() as group:
        following = group.create_task(printer.follow(config, args.counter))
        async with rkv.Client(config) as client:
            writers = [group.create_task(add(rkv.Session(client), args.counter, args.adds, stopping))
                       for _ in range(args.writers)]
            results = [await writer for writer in writers]
        last = max(version for _, version in results)
        await printer.until(last)
        following.cancel()
    print("added", sum(count for count, _ in results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="127.0.0.1:21001", help="IPv4:PORT,... of all nodes")
    parser.add_argument("--cert", help="file with the client's certificate, for TLS")
    parser.add_argument("--key-file", help="file with its private key")
    parser.add_argument("--ca", help="file with the CA of the nodes' certificates")
    parser.add_argument("--name", default="kv", help="a name that is in the certificates of all nodes")
    parser.add_argument("--counter", default="example/counter", help="key to count in")
    parser.add_argument("--writers", type=int, default=4, help="how many add at a time")
    parser.add_argument("--adds", type=int, default=100,
                        help="how often each of them adds 1; 0: until this program is told to stop")
    try:
        asyncio.run(run(parser.parse_args()))
    except ExceptionGroup as group:
        unknown = group.subgroup(rkv.OutcomeUnknown)
        if unknown is None:
            raise
        print("counter: 1 may have been added, or not:", unknown.exceptions, file=sys.stderr)
        sys.exit(4)  # as raft-key-value does


if __name__ == "__main__":
    main()
