"""Tests of rkv.py, with nodes that answer as a test says. ../go has one with a cluster."""
import asyncio
import unittest

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc_status import rpc_status
from raftkv.v1 import kv_pb2, kv_pb2_grpc

import rkv


def failure(code, reason=""):
    """An error: as a node gives it if there is a reason, and else as gRPC does."""
    status = status_pb2.Status(code=code.value[0], message=reason)
    if reason:
        info, retry = any_pb2.Any(), any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(domain="raftkv.v1", reason=reason))
        delay = error_details_pb2.RetryInfo()
        delay.retry_delay.FromMilliseconds(1)
        retry.Pack(delay)
        status.details.extend([info, retry])
    return rpc_status.to_status(status)


BROKEN = failure(StatusCode.UNAVAILABLE)
NO_LEADER = failure(StatusCode.UNAVAILABLE, "NO_LEADER")
UNKNOWN = failure(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
QUOTA = failure(StatusCode.RESOURCE_EXHAUSTED, "QUOTA")
SESSION_UNKNOWN = failure(StatusCode.FAILED_PRECONDITION, "SESSION_UNKNOWN")
TOO_OLD = failure(StatusCode.FAILED_PRECONDITION, "SEQUENCE_TOO_OLD")
TOO_FAR = failure(StatusCode.FAILED_PRECONDITION, "SEQUENCE_TOO_FAR")
INVALID = failure(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
COMPACTED = failure(StatusCode.OUT_OF_RANGE, "COMPACTED")
OTHER_CLUSTER = failure(StatusCode.FAILED_PRECONDITION, "OTHER_CLUSTER")
REFUSED = failure(StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
SILENT = "silent"


class FakeNode(kv_pb2_grpc.KVServiceServicer):
    """Answers as a test says, and notes what it was asked."""

    def __init__(self, answers=(), values=(), ends=(), tells=True):
        self.answers = list(answers)  # of the first Sets: an error, or a SetResponse
        self.values = list(values)  # of Gets
        self.ends = list(ends)  # of the first watches
        self.tells = tells  # of a version, before a watch ends
        self.sets, self.watches, self.sessions = [], [], 0

    async def OpenSession(self, request, context):
        self.sessions += 1
        return kv_pb2.OpenSessionResponse(session=1000 + self.sessions)

    async def Set(self, request, context):
        self.sets.append(request)
        answer = self.answers.pop(0) if self.answers else kv_pb2.SetResponse(version=5)
        if isinstance(answer, kv_pb2.SetResponse):
            return answer
        await context.abort_with_status(answer)

    async def Get(self, request, context):
        return self.values.pop(0)

    async def Scan(self, request, context):
        yield kv_pb2.ScanResponse(cluster_id=7, version=10)

    async def Watch(self, request, context):
        self.watches.append(request)
        if self.tells:
            yield kv_pb2.WatchResponse(cluster_id=7, version=10)
            version = 10 + len(self.watches)
            yield kv_pb2.WatchResponse(version=version, events=[kv_pb2.Event(key="key", version=version)])
        end = self.ends.pop(0) if self.ends else SILENT
        if end == SILENT:
            await asyncio.sleep(3600)
        if end is not None:
            await context.abort_with_status(end)


class Ledger(rkv.Follower):
    """Notes the versions of all events, and 0 for each beginning."""

    def __init__(self, until):
        self.until = until
        self.told = []
        self.is_done = asyncio.Event()

    def begin(self, keys, version):
        self.told.append(0)

    def change(self, events):
        self.told.extend(e.version for e in events)
        if self.told[-1] == self.until:
            self.is_done.set()


class Test(unittest.IsolatedAsyncioTestCase):
    async def start(self, *nodes):
        """Starts nodes, and returns how they are reached."""
        addresses = []
        for node in nodes:
            server = grpc.aio.server()
            kv_pb2_grpc.add_KVServiceServicer_to_server(node, server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            self.addAsyncCleanup(server.stop, 0)
        return rkv.Config(addresses)

    async def test_set(self):
        """Which errors are tried again, under the same ID, and what the caller is told."""
        for errors, tries, want in [
            ([], 1, None),
            ([BROKEN], 2, None),
            ([NO_LEADER], 2, None),
            ([failure(StatusCode.DEADLINE_EXCEEDED)], 2, None),
            ([failure(StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")], 2, None),
            ([QUOTA], 1, grpc.aio.AioRpcError),
            ([BROKEN, QUOTA], 2, rkv.OutcomeUnknown),
            ([UNKNOWN, QUOTA], 2, rkv.OutcomeUnknown),
            ([NO_LEADER, QUOTA], 2, grpc.aio.AioRpcError),
            ([failure(StatusCode.RESOURCE_EXHAUSTED)], 1, grpc.aio.AioRpcError),
            ([INVALID], 1, grpc.aio.AioRpcError),
            ([SESSION_UNKNOWN], 1, rkv.OutcomeUnknown),
            ([TOO_OLD], 1, rkv.OutcomeUnknown),
            ([TOO_FAR], 1, grpc.aio.AioRpcError),
        ]:
            with self.subTest(errors=errors):
                node = FakeNode(errors)
                async with rkv.Client(await self.start(node)) as client:
                    setting = rkv.Session(client).set("key", b"value")
                    if want:
                        with self.assertRaises(want):
                            await setting
                    else:
                        self.assertEqual(await setting, (5, True))
                ids = [(s.request_id.session, s.request_id.sequence) for s in node.sets]
                self.assertEqual(ids, tries * [(1001, 1)])

    async def test_session_is_replaced(self):
        """A session that the cluster will not have go on is replaced, and no other one is."""
        for error, want in [(SESSION_UNKNOWN, (1002, 1)), (TOO_OLD, (1002, 1)), (TOO_FAR, (1002, 1)), (INVALID, (1001, 2))]:
            node = FakeNode([error])
            async with rkv.Client(await self.start(node)) as client:
                session = rkv.Session(client)
                with self.assertRaises((grpc.aio.AioRpcError, rkv.OutcomeUnknown)):
                    await session.set("key", b"")
                await session.set("key", b"")
            self.assertEqual((node.sets[1].request_id.session, node.sets[1].request_id.sequence), want)

    async def test_update(self):
        """An update whose compare failed reads the key again."""
        node = FakeNode([kv_pb2.SetResponse(compare_failed=True, version=3), kv_pb2.SetResponse(version=4)],
                        [kv_pb2.GetResponse(), kv_pb2.GetResponse(value=b"a", version=3)])
        async with rkv.Client(await self.start(node)) as client:
            got = await rkv.Session(client).update("key", lambda old: (old or b"") + b"b")
        self.assertEqual(got, (b"ab", 4))
        self.assertEqual([s.expected_version for s in node.sets], [0, 3])
        self.assertTrue(node.sets[0].HasField("expected_version"))

    async def follow(self, until, *nodes):
        ledger = Ledger(until)
        following = asyncio.create_task(ledger.follow(await self.start(*nodes), "key"))
        try:
            await asyncio.wait_for(ledger.is_done.wait(), 30)
        finally:
            following.cancel()
        return ledger.told

    async def test_follow(self):
        """Where a follower goes on, or begins anew, after each end of a Watch."""
        for ends, want, starts in [
            ([BROKEN, BROKEN], [0, 11, 12, 13], [11, 12, 13]),
            ([None], [0, 11, 12], [11, 12]),
            ([SILENT], [0, 11, 12], [11, 12]),
            ([OTHER_CLUSTER], [0, 11, 0, 12], [11, 11]),
            ([BROKEN, COMPACTED], [0, 11, 12, 0, 13], [11, 12, 11]),
        ]:
            with self.subTest(ends=ends):
                node = FakeNode(ends=ends)
                self.assertEqual(await self.follow(want[-1], node), want)
                self.assertEqual([(w.from_version, w.cluster_id) for w in node.watches], [(v, 7) for v in starts])

    async def test_follow_asks_all(self):
        """A follower begins anew only if no node knows what comes next."""
        forgetful = [FakeNode(ends=4 * [COMPACTED], tells=False) for _ in range(2)]
        told = await self.follow(12, *forgetful, FakeNode(ends=[BROKEN]))
        self.assertEqual(told, [0, 11, 12])

    async def test_follow_refused(self):
        with self.assertRaises(grpc.aio.AioRpcError):
            await Ledger(0).follow(await self.start(FakeNode(ends=[REFUSED], tells=False)), "key")


if __name__ == "__main__":
    unittest.main()
