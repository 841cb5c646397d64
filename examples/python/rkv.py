"""A client of raft-key-value that is meant to be copied: change what does not fit.

docs/api.md says why it does what it does. It needs the code that is generated from kv.proto; see
../README.md.
"""
import asyncio
import dataclasses
import json
import random

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from raftkv.v1 import kv_pb2, kv_pb2_grpc

TRY_TIMEOUT = 5  # seconds, for one try of a call: finding a new leader takes about one
SILENCE = 5  # seconds, after which a follower leaves its node: it sends a response every second

# gRPC shares calls among all nodes that are healthy. There is no retryPolicy: what gRPC sends
# again by itself, it tells nobody, and then the last error of a write would not say whether an
# earlier try may have been applied. See repeat.
SERVICE_CONFIG = json.dumps({
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "raftkv.v1.KVService"},
})

OPTIONS = [
    ("grpc.service_config", SERVICE_CONFIG),
    # A node that hangs is left after 13 s. Nodes refuse pings that come more often than every 5 s.
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    # gRPC's own back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3000),  # bounds a try to connect
    ("grpc.max_reconnect_backoff_ms", 5000),
    # Channels to the same nodes do not share connections: closing one does not disturb another.
    ("grpc.use_local_subchannel_pool", 1),
]


class OutcomeUnknown(Exception):
    """A write may have been applied, or may be applied later: the key's value tells."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How nodes are reached."""
    nodes: list[str]  # IPv4 addresses with ports, such as 10.0.0.1:21001
    # The client's certificate and its key, and the CA of the nodes', in PEM. All, or none: then
    # there is no TLS.
    cert_file: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    # A name that is in the certificates of all nodes.
    name: str = "kv"

    def channel(self):
        target = "ipv4:" + ",".join(self.nodes)
        if self.cert_file is None and self.key_file is None and self.ca_file is None:
            return grpc.aio.insecure_channel(target, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(  # which are read once: others need a restart
            root_certificates=read(self.ca_file),
            private_key=read(self.key_file),
            certificate_chain=read(self.cert_file))
        return grpc.aio.secure_channel(
            target, credentials, options=[*OPTIONS, ("grpc.default_authority", self.name)])


def read(path):
    with open(path, "rb") as f:
        return f.read()


class Client:
    """Calls a cluster. Many tasks may use it. It ends as a context manager does."""

    def __init__(self, config):
        self.channel = config.channel()
        self.kv = kv_pb2_grpc.KVServiceStub(self.channel)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.channel.close()

    async def get(self, key, timeout=30):
        """Returns a key's value and version: None and 0 if it is absent.

        It sees every write that was acknowledged before, at whichever node.
        """
        resp = await repeat(self.kv.Get, kv_pb2.GetRequest(key=key), timeout)
        return (resp.value if resp.HasField("value") else None), resp.version


class Session:
    """Makes writes that take effect once, however often they are sent.

    It makes one at a time. A program that wants many at a time opens several sessions: a session
    could have up to 1,023 in flight, but none may lag behind the newest by more.
    """

    def __init__(self, client):
        self.client = client
        self.lock = asyncio.Lock()
        self.number = 0  # as OpenSession answered it; 0: it is not open
        self.sequence = 0  # of the last write

    async def set(self, key, value, if_version=None, timeout=30):
        """Writes a key; with if_version only if the key has that version, 0: is absent.

        Returns the version of the write and True; or the version that the key has, and False.
        If several tries were needed, the answer is that of the one which was applied. Without the
        request ID, a compare-and-set whose first answer was lost would find its own write there.
        """
        request = kv_pb2.SetRequest(key=key, value=value, expected_version=if_version)
        resp = await self._write(self.client.kv.Set, request, timeout)
        return resp.version, not resp.compare_failed

    async def delete(self, key, timeout=30):
        """Removes a key, and returns whether it was there."""
        resp = await self._write(self.client.kv.Delete, kv_pb2.DeleteRequest(key=key), timeout)
        return resp.deleted

    async def update(self, key, change, timeout=30):
        """Has a key's value changed by a function of it, as if nobody else wrote meanwhile.

        The function may be called several times. Returns the new value and its version.
        """
        pauses = Pauses(first=0.02, longest=1)
        deadline = now() + timeout
        while True:
            old, version = await self.client.get(key, remaining(deadline))
            new = change(old)
            version, done = await self.set(key, new, version, remaining(deadline))
            if done:
                return new, version
            await pauses.wait(None)  # for whoever was first may be about to write again

    async def _write(self, method, request, timeout):
        """Makes a write under the next request ID, the same one in every try."""
        async with self.lock:
            await self._open(timeout)
            self.sequence += 1
            request.request_id.session = self.number
            request.request_id.sequence = self.sequence
            history = []
            try:
                return await repeat(method, request, timeout, history)
            except grpc.aio.AioRpcError as err:
                unknown = any(may_be_applied(e) for e in history)
                why = reason(err)
                if why in ("SESSION_UNKNOWN", "SEQUENCE_TOO_OLD"):
                    # The cluster does not know any more what was applied under this ID.
                    self.number = 0
                    unknown = True
                if why == "SEQUENCE_TOO_FAR":  # too many writes were given up, or refused for want of room
                    self.number = 0
                if unknown:
                    raise OutcomeUnknown() from err
                raise

    async def _open(self, timeout):
        """Opens the session, unless it is open.

        A session that nobody knows of does no harm, so OpenSession may be sent again.
        """
        if self.number == 0:
            resp = await repeat(self.client.kv.OpenSession, kv_pb2.OpenSessionRequest(), timeout)
            self.number = resp.session
            self.sequence = 0


async def repeat(method, request, timeout, history=None):
    """Makes a call until it succeeds, fails for good, or the time is up.

    The call has to be a read, an OpenSession, or a write with a request ID, the same one in every
    try: these may be sent again after whatever UNAVAILABLE or DEADLINE_EXCEEDED. history gets the
    errors of all tries.
    """
    pauses = Pauses(first=0.2, longest=1)
    deadline = now() + timeout
    while True:
        try:
            return await method(request, timeout=min(TRY_TIMEOUT, remaining(deadline)))
        except grpc.aio.AioRpcError as err:
            if history is not None:
                history.append(err)
            if not may_send_again(err):
                raise
            pause = pauses.next(err)
            if pause >= remaining(deadline):
                raise
            await asyncio.sleep(pause)


def now():
    return asyncio.get_running_loop().time()


def remaining(deadline):
    return max(deadline - now(), 0)


def may_send_again(err):
    """Whether a call that ended so may be sent again, soon and as it is."""
    if err.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return reason(err) == "OVERLOADED"  # and not QUOTA: that needs somebody who makes room
    return err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def may_be_applied(err):
    """Whether a write that ended so may have been applied all the same."""
    why = reason(err)
    if why:
        return why == "OUTCOME_UNKNOWN"
    # The error is gRPC's. Others than these it gives before a write is applied.
    return err.code() in (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def details(err, kind):
    """The detail of a kind that a node gives with its error; None: it gives none."""
    status = rpc_status.from_call(err)
    for detail in status.details if status else ():
        found = kind()
        if detail.Unpack(found):
            return found
    return None


def reason(err):
    """What a node says of its error; empty: the error is none of a node's."""
    info = details(err, error_details_pb2.ErrorInfo)
    return info.reason if info and info.domain == "raftkv.v1" else ""


class Pauses:
    """The pauses between tries. Each is random, up to a limit that doubles.

    Clients that a node has failed at one moment do not all come back at one moment.
    """

    def __init__(self, first, longest):
        self.first = first  # the longest that the first pause may be, in seconds
        self.longest = longest
        self.limit = 0

    def next(self, err):
        """Draws the pause after an error, or takes what the node asks for if that is longer."""
        self.limit = min(max(2 * self.limit, self.first), self.longest)
        pause = random.uniform(0, self.limit)
        retry = details(err, error_details_pb2.RetryInfo) if err else None
        if retry:
            pause = max(pause, retry.retry_delay.ToTimedelta().total_seconds())
        return pause

    async def wait(self, err):
        await asyncio.sleep(self.next(err))

    def reset(self):
        self.limit = 0


class Follower:
    """Is told of all keys that start with a prefix. Subclasses say what it does with that."""

    def begin(self, keys, version):
        """Takes all keys as they were at one moment.

        It is called at first, and again if the nodes do not know any more what was written since,
        or the cluster was restored.
        """

    def change(self, events):
        """Takes the writes after that: each once, in the order of versions, none left out."""

    def fail(self, err):
        """Takes what has ended a stream, which goes on at another node."""

    async def follow(self, config, prefix):
        """Follows for ever, or until a node refuses for good.

        It is connected to one node at a time, and takes the next one when that fails: so it knows
        when it has asked all of them.
        """
        position = _Position(self, prefix)
        pauses = Pauses(first=1, longest=5)
        i = random.randrange(len(config.nodes))  # many followers share the nodes among them
        while True:
            one = dataclasses.replace(config, nodes=[config.nodes[i % len(config.nodes)]])
            i += 1
            before = position.version
            try:
                async with Client(one) as client:
                    await position.follow_at(client.kv)
                err = None
            except grpc.aio.AioRpcError as e:
                if e.code() in REFUSED:
                    raise
                err = e
                position.note(reason(e), len(config.nodes))
                self.fail(e)
            except asyncio.TimeoutError as e:
                err = None
                self.fail(e)
            if position.version != before:  # it got on
                pauses.reset()
            await pauses.wait(err)


# Every node would end the call in this way.
REFUSED = (
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)


class _Position:
    """How far a follower is told."""

    def __init__(self, follower, prefix):
        self.follower = follower
        self.prefix = prefix
        self.cluster_id = 0  # 0: it begins anew
        self.version = 0  # up to which it is told all
        self.compacted = 0  # how many nodes have not known what comes next

    def note(self, why, nodes):
        """Has the follower begin anew if an error says that it cannot go on."""
        if why == "OTHER_CLUSTER":
            self.cluster_id = 0
        if why == "COMPACTED":
            self.compacted += 1
            if self.compacted >= nodes:  # until then, another node may know more
                self.cluster_id = 0

    async def follow_at(self, kv):
        """Tells the follower what comes next, by one node, until the stream ends."""
        if self.cluster_id == 0:
            await self.scan(kv)
        request = kv_pb2.WatchRequest(
            prefix=self.prefix,
            from_version=self.version + 1,  # what the Scan, or the Watch before, has not told
            cluster_id=self.cluster_id)
        first = True
        async for resp in responses(kv.Watch(request)):
            if not first:  # the first response has no events
                if resp.events:
                    self.follower.change(resp.events)
                self.version = resp.version  # after its events: the next Watch begins behind them
                self.compacted = 0
            first = False

    async def scan(self, kv):
        """Has the follower begin with all keys, once they are here."""
        keys = []
        first = None
        async for resp in responses(kv.Scan(kv_pb2.ScanRequest(prefix=self.prefix))):
            first = first or resp
            keys.extend(resp.items)
        self.follower.begin(keys, first.version)
        self.cluster_id, self.version, self.compacted = first.cluster_id, first.version, 0


async def responses(call):
    """The responses of a stream, none of which may be long in coming."""
    try:
        while True:
            resp = await asyncio.wait_for(call.read(), SILENCE)
            if resp is grpc.aio.EOF:
                return
            yield resp
    finally:
        call.cancel()
