"""What the checks of the wire share: how they fail, what they say, and what comes out of streams.
Knows the shape of events and errors; knows no server and no check."""

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class CheckFailed(Exception):
    """The server did not do what it should."""


def expect(condition, message):
    """Fails the current check with `message` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message)


def say(text):
    """A line of the transcript below the current check's title."""
    print(f"      {text}", flush=True)


def short(text, limit=60):
    """Text for one line of the transcript."""
    text = repr(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def failed_call(call, code):
    """Runs a call that must fail with `code`; gives the error."""
    try:
        call()
    except grpc.RpcError as error:
        expect(error.code() == code, f"wanted {code.name}, got {described(error)}")
        return error
    raise CheckFailed(f"wanted {code.name}, but the call succeeded")


def described(error):
    """Code and message of a failed call."""
    return f"{error.code().name}: {error.details()}"


def details_of(error):
    """The rich details of a failed call, by message name."""
    status = rpc_status.from_call(error)
    expect(status is not None, f"no grpc-status-details-bin with {described(error)}")
    found = {}
    for packed in status.details:
        name = packed.type_url.rsplit(".", 1)[-1]
        message = getattr(error_details_pb2, name)()
        expect(packed.Unpack(message), f"{packed.type_url} cannot be unpacked")
        found[name] = message
    return found


def metadata_of(call):
    """Initial and trailing metadata of an ended call together."""
    pairs = list(call.initial_metadata() or []) + list(call.trailing_metadata() or [])
    return {key: value for key, value in pairs}


class Streamed:
    """Everything that came out of one stream."""

    def __init__(self, events):
        self.started, self.finished = None, None
        self.text, self.ids, self.num_events = "", [], 0
        for event in events:
            self.add(event)

    def add(self, event):
        """Takes the next event and checks its place in the order."""
        kind = event.WhichOneof("event")
        expect((kind == "started") == (self.num_events == 0), f"{kind} as event {self.num_events}")
        expect(self.finished is None, f"{kind} behind finished")
        self.num_events += 1
        if kind == "started":
            self.started = event.started
        elif kind == "tokens":
            self.text += event.tokens.text
            self.ids += [token.id for token in event.tokens.tokens]
        else:
            self.finished = event.finished

    def bytes(self):
        """What the server's promise is about."""
        return (self.ids, self.text, self.finished.reason)

    def cached(self):
        """Prompt tokens that were not computed for it."""
        return self.finished.usage.cached_prompt_tokens


def samples_of(events, num):
    """The streams of several samples, taken apart."""
    started, apart = next(events), [[] for _ in range(num)]
    for event in events:
        news = event.tokens if event.WhichOneof("event") == "tokens" else event.finished
        apart[news.sample].append(event)
    return [Streamed([started, *events]) for events in apart]
