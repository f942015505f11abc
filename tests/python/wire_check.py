#!/usr/bin/env python3
"""Checks a running slipstream server as its clients see it, over gRPC and HTTP.

    pip install -r tests/python/requirements.txt
    slipstream serve &
    python tests/python/wire_check.py --server 127.0.0.1:50051

Every check prints what it saw and PASS or FAIL. Exit code 0 when all passed. Stubs are made by
reflection. Written for a server with default limits and the embedded pair; other models of a
context of 1024 positions or more work as well.
"""

import argparse
import random
import re
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from checking import (
    described,
    details_of,
    expect,
    failed_call,
    metadata_of,
    samples_of,
    say,
    short,
    Streamed,
)
from reflected import REFLECTION_VERSIONS, Reflected, list_services, open_channel

PACKAGE = "slipstream.v1"
PROMPT = "use std::collections::HashMap;\n\npub struct Cache {\n"
# Long enough to be still running when something happens to it.
LONG = 900
# How long any single call may take before this script gives up on it.
PATIENCE_S = 60
MESSAGE_BYTES_MAX = 4 << 20
# More than the server's default number of places (64 running, 256 waiting), so that places which
# do not come back would run out.
CANCELLED_CALLS = 400
# Positions of one KV block: what requests share is a number of these.
BLOCK_LEN = 16
StatusCode = grpc.StatusCode


class Checks:
    """All checks, in the order of their definition. Each opens with what must hold."""

    def __init__(self, server, http, reflected=None):
        self.server, self.http = server, http
        self.channel = open_channel(server)
        self.reflected = reflected or Reflected(self.channel)

    def request(self, **fields):
        """A sampled request that runs to its length; `fields` change it."""
        defaults = dict(text=PROMPT, max_tokens=32, temperature=0.8, seed=7, ignore_eos=True)
        if "token_ids" in fields:
            defaults.pop("text")
        return self.reflected.message(f"{PACKAGE}.GenerateRequest")(**(defaults | fields))

    @property
    def completions(self):
        """Stubs of the completion service."""
        return self.reflected.service(f"{PACKAGE}.Completions")

    def stream(self, completions=None, metadata=(), **fields):
        """One streamed completion, to its end."""
        completions = completions or self.completions
        request = self.request(**fields)
        return Streamed(completions.Generate(request, timeout=PATIENCE_S, metadata=metadata))

    def make(self, message, /, **fields):
        """A message of the package."""
        return self.reflected.message(f"{PACKAGE}.{message}")(**fields)

    def check_reflection(self):
        """Reflection v1 and v1alpha list the same services"""
        lists = [list_services(self.channel, version) for version in REFLECTION_VERSIONS]
        say(", ".join(lists[0]))
        expect(lists[0] == lists[1], f"v1 and v1alpha differ: {lists}")
        for name in ("Completions", "Tokenization", "Models"):
            expect(f"{PACKAGE}.{name}" in lists[0], f"{name} is not listed")
        expect("grpc.health.v1.Health" in lists[0], "health is not listed")

    def check_unary(self):
        """Complete answers in one message"""
        answer = self.completions.Complete(self.request(), timeout=PATIENCE_S)
        say(f"model {answer.started.model}, fingerprint {answer.started.fingerprint}")
        say(f"{len(answer.tokens)} tokens: {short(answer.text)}")
        expect(len(answer.tokens) == 32, "not 32 tokens")
        expect(answer.finished.usage.output_tokens == 32, "usage counts other tokens than came")

    def check_stream(self):
        """Generate streams the same bytes, and a seed repeats them"""
        unary = self.completions.Complete(self.request(), timeout=PATIENCE_S)
        streams = [self.stream(), self.stream()]
        for stream in streams:
            expect(stream.text == unary.text, "stream and unary differ")
            expect(stream.ids == [token.id for token in unary.tokens], "their tokens differ")
            expect(stream.finished.reason == unary.finished.reason, "their ends differ")
        other = self.stream(seed=8)
        expect(other.ids != streams[0].ids, "another seed gave the same tokens")
        say(f"{streams[0].num_events} events, text equal to unary, twice; seed 8 differs")

    def check_speculation(self):
        """Speculation changes no byte"""
        mode = self.reflected.enum(f"{PACKAGE}.Speculation.Mode")
        plain = self.stream(max_tokens=128, speculation={"mode": mode["MODE_OFF"].number})
        for draft_len in (1, 4, 8):
            fixed = {"mode": mode["MODE_FIXED"].number, "draft_len": draft_len}
            stream = self.stream(max_tokens=128, speculation=fixed)
            counts = stream.finished.speculation
            say(f"draft_len {draft_len}: {counts.accepted} of {counts.proposed} accepted")
            expect(stream.bytes() == plain.bytes(), f"draft_len {draft_len} changed the output")

    def check_cancel(self):
        """A cancelled stream gives its place back"""
        generate = self.completions.Generate
        for index in range(CANCELLED_CALLS):
            call = generate(self.request(max_tokens=LONG), timeout=PATIENCE_S)
            for _ in range(1 + index % 3):
                next(call)
            call.cancel()
            expect(call.code() == StatusCode.CANCELLED, f"call {index} ended {call.code()}")
        stream = self.stream()
        say(f"{CANCELLED_CALLS} streams cancelled after 1 to 3 events; the next one ran to its end")
        expect(len(stream.ids) == 32, "the next stream was cut")

    def check_deadline(self):
        """A deadline of 20 ms ends calls with DEADLINE_EXCEEDED"""
        generate = self.completions.Generate
        calls = [generate(self.request(max_tokens=LONG, seed=i), timeout=0.02) for i in range(16)]
        num_late, num_by_server = 0, 0
        for call in calls:
            try:
                for _ in call:
                    pass
            except grpc.RpcError as error:
                expect(error.code() == StatusCode.DEADLINE_EXCEEDED, described(error))
                num_late += 1
                num_by_server += "deadline passed" in error.details()
        say(f"{num_late} of 16 late, {num_by_server} of them told so by the server")
        expect(num_late > 0, "16 long completions in 20 ms are more than a server can do")
        expect(len(self.stream().ids) == 32, "the next stream was cut")

    def check_health(self):
        """Health answers and watches per service name"""
        health = health_pb2_grpc.HealthStub(self.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        ours = [name for name in list_services(self.channel, "v1") if name.startswith(PACKAGE)]
        for name in ["", *ours]:
            question = health_pb2.HealthCheckRequest(service=name)
            status = health.Check(question, timeout=10).status
            watch = health.Watch(question, timeout=10)
            watched = next(watch).status
            watch.cancel()
            status_name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            say(f"{name or '(the server)'}: {status_name}")
            expect(status == serving and watched == serving, f"{name!r} is not serving")
        unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
        failed_call(lambda: health.Check(unknown, timeout=10), StatusCode.NOT_FOUND)

    def check_error_details(self):
        """An invalid field is named in the error details"""
        bad = self.request(temperature=-1, request_id="wire-check-1")
        error = failed_call(
            lambda: self.completions.Complete(bad, timeout=10), StatusCode.INVALID_ARGUMENT
        )
        say(described(error))
        details = details_of(error)
        violation = details["BadRequest"].field_violations[0]
        info = details["ErrorInfo"]
        say(f"BadRequest {violation.field}: {violation.description}")
        named = details["RequestInfo"].request_id
        say(f"ErrorInfo {info.domain} {info.reason}; RequestInfo {named}")
        expect(violation.field == "temperature", "another field is named")
        expect(info.reason and info.domain, "ErrorInfo lacks reason or domain")
        expect(named == "wire-check-1", "another request is named")

    def check_unknown_model(self):
        """Another model is NOT_FOUND, another method UNIMPLEMENTED"""
        wrong = self.request(model="no-such-model")
        error = failed_call(
            lambda: self.completions.Complete(wrong, timeout=10), StatusCode.NOT_FOUND
        )
        say(described(error))
        for path in (f"/{PACKAGE}.Completions/NoSuch", "/no.such.Service/Method"):
            call = self.channel.unary_unary(path)
            error = failed_call(lambda: call(b"", timeout=10), StatusCode.UNIMPLEMENTED)
            say(f"{path}: {error.code().name}")

    def check_metadata(self):
        """x-request-id comes back, traceparent is accepted"""
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        for traceparent in (trace, "not a trace"):
            metadata = (("x-request-id", "wire-check-2"), ("traceparent", traceparent))
            answer, call = self.completions.Complete.with_call(
                self.request(), timeout=PATIENCE_S, metadata=metadata
            )
            given = metadata_of(call).get("x-request-id")
            say(f"traceparent {traceparent!r}: x-request-id {given!r}")
            expect(given == "wire-check-2", "x-request-id did not come back")
            expect(answer.started.request_id == "wire-check-2", "Started names another id")
        _, call = self.completions.Complete.with_call(self.request(), timeout=PATIENCE_S)
        expect(metadata_of(call).get("x-request-id"), "no x-request-id was drawn")
        bad = self.request(temperature=-1)
        error = failed_call(
            lambda: self.completions.Complete(bad, timeout=10), StatusCode.INVALID_ARGUMENT
        )
        expect(metadata_of(error).get("x-request-id"), "a refused call has no x-request-id")

    def check_tokenization(self):
        """Tokenize and Detokenize agree with completions"""
        tokenization = self.reflected.service(f"{PACKAGE}.Tokenization")
        ids = list(tokenization.Tokenize(self.make("TokenizeRequest", text=PROMPT)).token_ids)
        stream = self.stream()
        expect(len(ids) == stream.started.prompt_tokens, "another number of prompt tokens")
        by_ids = self.stream(token_ids={"ids": ids})
        expect(by_ids.bytes() == stream.bytes(), "text and its ids complete differently")
        question = self.make("DetokenizeRequest", token_ids=ids)
        expect(tokenization.Detokenize(question).text == PROMPT, "the text did not come back")
        text = "naïve 🦀 \x00 \r\n\ttabs"
        question = self.make("TokenizeRequest", text=text, token_bytes=True)
        pieces = tokenization.Tokenize(question).token_bytes
        expect(b"".join(pieces) == text.encode(), "token bytes are other bytes")
        say(f"{len(PROMPT)} characters are {len(ids)} tokens, and came back")

    def check_models(self):
        """Models.List and Models.Get describe what is served"""
        models = self.reflected.service(f"{PACKAGE}.Models")
        listed = models.List(self.make("ListModelsRequest"), timeout=10).models
        expect(len(listed) == 1, f"{len(listed)} models")
        model = listed[0]
        say(f"{model.name}: vocabulary {model.vocab_size}, context {model.context_len}, "
            f"draft {model.draft.name or 'none'}")
        for name in ("", model.name):
            got = models.Get(self.make("GetModelRequest", name=name), timeout=10)
            expect(got == model, f"Get({name!r}) differs from List")
        started = self.stream().started
        expect(started.model == model.name, "Started names another model")
        expect(started.fingerprint == model.fingerprint, "Started has another fingerprint")
        wrong = self.make("GetModelRequest", name="no-such-model")
        failed_call(lambda: models.Get(wrong, timeout=10), StatusCode.NOT_FOUND)

    def check_abort(self):
        """Abort ends live streams with CANCELLED, and is idempotent"""
        name = f"wire-check-{random.randrange(1 << 32)}"
        calls = [
            self.completions.Generate(
                self.request(max_tokens=LONG, request_id=name), timeout=PATIENCE_S
            )
            for _ in range(32)
        ]
        for call in calls:
            expect(next(call).started.request_id == name, "Started names another id")
        question = self.make("AbortRequest", request_ids=[name])
        aborted = self.completions.Abort(question, timeout=10).aborted
        codes = [self.ended(call) for call in calls]
        num_cancelled = codes.count(StatusCode.CANCELLED)
        say(f"32 streams of one id: {aborted} aborted, {num_cancelled} ended CANCELLED")
        expect(aborted > 0, "nothing was alive to be aborted")
        # One that was told to end may have come to its own end first.
        expect(0 < num_cancelled <= aborted, "other streams ended than were told to")
        expect(set(codes) <= {StatusCode.OK, StatusCode.CANCELLED}, f"{set(codes)}")
        expect(self.completions.Abort(question, timeout=10).aborted == 0, "aborted twice")

    @staticmethod
    def ended(call):
        """Reads a stream to its end; gives its code."""
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            pass
        return call.code()

    def check_limits(self):
        """A message over the limit ends RESOURCE_EXHAUSTED, a long prompt OUT_OF_RANGE"""
        huge = self.request(text="a" * (MESSAGE_BYTES_MAX + 1))
        error = failed_call(
            lambda: self.completions.Complete(huge, timeout=PATIENCE_S),
            StatusCode.RESOURCE_EXHAUSTED,
        )
        say(described(error))
        far = self.request(max_tokens=1 << 30)
        error = failed_call(
            lambda: self.completions.Complete(far, timeout=PATIENCE_S), StatusCode.OUT_OF_RANGE
        )
        say(described(error))

    def check_concurrency(self):
        """32 streams on one connection give the bytes that each gives alone"""
        alone = [self.stream(seed=seed, max_tokens=64).bytes() for seed in range(32)]
        completions = self.completions

        def run(seed):
            return self.stream(completions, seed=seed, max_tokens=64).bytes()

        with ThreadPoolExecutor(32) as threads:
            together = list(threads.map(run, range(32)))
        expect(together == alone, "a stream depends on its neighbours")
        say("32 seeds, 64 tokens each: equal alone and together")

    def check_resume(self):
        """A completion goes on behind output_prefix exactly as it would have"""
        whole = self.stream(max_tokens=96)
        for cut in (1, 48, 95):
            rest = self.stream(max_tokens=96, output_prefix=whole.ids[:cut])
            expect(whole.ids[:cut] + rest.ids == whole.ids, f"cut at {cut}: other tokens")
            expect(whole.text.endswith(rest.text), f"cut at {cut}: other text")
        say("cut behind 1, 48 and 95 of 96 tokens: the rest is the same")

    def check_samples(self):
        """n samples are n completions, streamed and in one message"""
        alone = [self.stream(sample_index=3 + i, max_tokens=48).bytes() for i in range(4)]
        request = self.request(sample_index=3, max_tokens=48, n=4)
        streams = samples_of(self.completions.Generate(request, timeout=PATIENCE_S), 4)
        expect([stream.bytes() for stream in streams] == alone, "streamed samples differ")
        answer = self.completions.Complete(request, timeout=PATIENCE_S)
        unary = [answer, *answer.more_samples]
        ids = [[token.id for token in sample.tokens] for sample in unary]
        expect(ids == [sample[0] for sample in alone], "samples of one message differ")
        expect(len({text for _, text, _ in alone}) > 1, "all samples are the same")
        say(f"4 samples equal to 4 calls; cached prompt tokens: {[s.cached() for s in streams]} "
            f"of {streams[0].started.prompt_tokens}")
        for fields, field in (
            (dict(n=0), "n"), (dict(n=17), "n"), (dict(n=2, output_prefix=[1]), "output_prefix")
        ):
            self.refused_field(field, **fields)

    def refused_field(self, field, **fields):
        """Asks for something that is refused; gives what is said of the field."""
        bad = self.request(**fields)
        error = failed_call(
            lambda: self.completions.Complete(bad, timeout=10), StatusCode.INVALID_ARGUMENT
        )
        violation = details_of(error)["BadRequest"].field_violations[0]
        expect(violation.field == field, f"{violation.field} is named, not {field}")
        return violation.description

    def check_sharing(self):
        """Equal prompts share their KV within one tenant and one salt, and nowhere else"""
        draw = random.randrange(1 << 32)
        text = "".join(f"let a{line} = b{draw + line}.get({line});\n" for line in range(16))

        def cached(tenant="one", **fields):
            stream = self.stream(text=text, tenant=tenant, **fields)
            expect(stream.bytes() == cold.bytes(), "what is shared changed the output")
            return stream.cached()

        cold = self.stream(text=text, tenant="one")
        num = cold.started.prompt_tokens
        expect(cold.cached() == 0, "somebody asked this before")
        found = cached()
        say(f"of {num} prompt tokens: 0 cached cold, {found} warm, 0 for others")
        expect(found == (num - 1) // BLOCK_LEN * BLOCK_LEN, "not all full blocks were found")
        expect(cached(tenant="two") == 0, "another tenant found them")
        expect(cached(cache_salt="s") == 0, "another salt found them")
        expect(cached(no_prefix_reuse=True) == 0, "who opts out found them")
        named = cached(tenant="", metadata=(("x-tenant-id", "one"),))
        expect(named == found, "x-tenant-id names another tenant")
        say(f"the same by x-tenant-id: {named}")
        self.refused_field("tenant", tenant="a b")
        self.refused_field("cache_salt", cache_salt="s" * 129)

    def check_priority(self):
        """Every class is served with the same bytes"""
        classes = self.reflected.enum(f"{PACKAGE}.Priority")
        names = [f"PRIORITY_{name}" for name in ("INTERACTIVE", "NORMAL", "BATCH")]
        plain = self.stream()
        for name in names:
            stream = self.stream(priority=classes[name].number)
            expect(stream.bytes() == plain.bytes(), f"{name} changed the output")
        said = self.refused_field("priority", priority=77)
        say(f"{', '.join(names)}: the same bytes; 77: {said}")

    def get(self, path):
        """Code, content type and text of an HTTP answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self.http}{path}", timeout=10) as answer:
                kind = answer.headers.get("content-type", "")
                return answer.status, kind, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("content-type", ""), error.read().decode()

    def counters(self):
        """Sums of all samples on /metrics by name, whatever their labels."""
        _, _, text = self.get("/metrics")
        sums = {}
        samples = re.findall(r"^([a-z_:][\w:]*)(?:\{.*\})? ([0-9.eE+-]+)$", text, re.MULTILINE)
        for name, value in samples:
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def check_http(self):
        """/health, /ready and /version answer over HTTP"""
        for path in ("/health", "/ready", "/version"):
            code, kind, text = self.get(path)
            say(f"GET {path}: {code} {kind} {short(text)}")
            expect(code == 200, f"{path} answers {code}")
        code, _, _ = self.get("/no-such-path")
        expect(code == 404, f"an unknown path answers {code}")

    def check_metrics(self):
        """/metrics counts: requests taken, ended and released balance"""
        code, kind, text = self.get("/metrics")
        expect(code == 200 and kind.startswith("text/plain"), f"{code} {kind}")
        expect("spec_decode_num_" in text, "no spec_decode_num_* counters")
        names = ("submitted", "finished", "released")
        stages = [f"slipstream_requests_{name}_total" for name in names]
        # Requests of the checks before may not be released yet.
        before = self.balanced(stages)
        self.stream()
        after = self.balanced(stages)
        say(f"{stages[0]} went from {before:.0f} to {after:.0f}; as many finished and released")
        expect(after == before + 1, "one request was not counted as one")

    def balanced(self, stages):
        """Waits until all these counters are equal; gives their value."""
        deadline = time.monotonic() + 10
        while True:
            counters = self.counters()
            values = [counters.get(stage) for stage in stages]
            if None not in values and len(set(values)) == 1:
                return values[0]
            expect(time.monotonic() < deadline, f"submitted, finished, released: {values}")
            time.sleep(0.05)


def main():
    """Runs all checks, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--server", default="127.0.0.1:50051", help="host:port of gRPC")
    parser.add_argument("--http", help="host:port of HTTP [default: that of gRPC]")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="checks to run, e.g. cancel")
    args = parser.parse_args()
    return run_all(Checks(args.server, args.http or args.server), args.only)


def run_all(checks, only=None):
    """Runs checks in order and prints how each went; gives the exit code."""
    python = sys.version.split()[0]
    print(f"slipstream at {checks.server}, grpcio {grpc.__version__}, Python {python}")
    names = [name for name in vars(Checks) if name.startswith("check_")]
    names = [name for name in names if not only or name.removeprefix("check_") in only]
    num_failed = 0
    for name in names:
        check = getattr(checks, name)
        print(f"\n    {name.removeprefix('check_')}: {check.__doc__}", flush=True)
        try:
            check()
            print(f"PASS  {name.removeprefix('check_')}", flush=True)
        except Exception as error:  # whatever went wrong, the other checks still run
            what = described(error) if isinstance(error, grpc.RpcError) else error
            kind = type(error).__name__
            print(f"FAIL  {name.removeprefix('check_')}: {kind}: {what}", flush=True)
            num_failed += 1
    print(f"\n{len(names) - num_failed} passed, {num_failed} failed")
    return 1 if num_failed or not names else 0


if __name__ == "__main__":
    sys.exit(main())
