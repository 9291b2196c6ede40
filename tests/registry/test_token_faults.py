"""Every way a registry's authentication can fail, and what a reader gets."""

from __future__ import annotations

import threading
import time

import pytest

from obdlab.call import UNBOUND, Call
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Found, Pair
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository
from tests.registry import faulty
from tests.registry.faulty import faulty_registry
from tests.registry.reading import DATA, DEADLINE_S, WANTED, assert_located, credentials, read, with_password


def test_token_is_shared_and_renewed_when_refused() -> None:
    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        assert read(client, registry) == read(client, registry) == WANTED
        assert registry.tokens_issued == 1
        registry.revoke_tokens()
        assert read(client, registry) == WANTED
        assert registry.tokens_issued == 2
        client.close()


def test_expired_token_is_not_sent() -> None:
    with faulty_registry(auth="bearer", token_life_s=0.2) as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        assert read(client, registry) == WANTED
        time.sleep(0.25)
        assert read(client, registry) == WANTED
        assert registry.tokens_issued == 2
        sent = [request.authorization for request in registry.blob_requests()]
        assert sent == [None, "Bearer token-1", "Bearer token-2"]
        client.close()


def test_many_threads_share_one_new_token() -> None:
    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        read(client, registry)
        registry.revoke_tokens()
        results: list[bytes] = []
        threads = [threading.Thread(target=lambda: results.append(read(client, registry))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [WANTED] * 8
        assert registry.tokens_issued == 2
        client.close()


def test_another_threads_token_that_is_refused_is_not_the_last_one() -> None:
    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        read(client, registry)

        def refuse_while_another_is_served(answer: faulty.Answer) -> None:
            registry.revoke_tokens()
            assert read(client, registry) == WANTED
            registry.revoke_tokens()
            answer.handler.refuse()

        registry.next(refuse_while_another_is_served)
        assert read(client, registry) == WANTED
        assert registry.tokens_issued == 3
        sent = [request.authorization for request in registry.blob_requests()]
        # The second and third of these are the other thread's.
        assert sent[2:] == ["Bearer token-1", "Bearer token-1", "Bearer token-2", "Bearer token-2", "Bearer token-3"]
        client.close()


def test_a_failure_with_another_threads_token_is_that_failure() -> None:
    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        read(client, registry)

        def refuse_while_another_is_served(answer: faulty.Answer) -> None:
            registry.revoke_tokens()
            assert read(client, registry) == WANTED
            answer.handler.refuse()

        registry.next(refuse_while_another_is_served, None, faulty.status(503))
        assert read(client, registry) == WANTED
        assert registry.tokens_issued == 2
        client.close()


class Rotating:
    """Credentials that have changed since they were read, as a refusal shows."""

    def look_up(self, repository: Repository, url: str, refused: Pair | None = None, call: Call = UNBOUND) -> Found:
        return Found(("user", "old" if refused is None else "new"))

    def likely(self, repository: Repository) -> bool:
        return True


@pytest.mark.parametrize("code", [400, 401, 403])
def test_a_token_server_that_refuses_a_password_is_asked_with_the_next(code: int) -> None:
    with faulty_registry(auth="bearer", password="old") as registry:
        registry.add_blob(DATA)

        def refuse_once(answer: faulty.Answer) -> None:
            registry.password, registry.token_fault = "new", None
            faulty.status(code)(answer)

        registry.token_fault = refuse_once
        client = RegistryClient(Rotating(), request_timeout_s=20, deadline_s=60)
        assert read(client, registry) == WANTED
        assert registry.tokens_issued == 2
        client.close()


@pytest.mark.parametrize(("size", "good"), [(256 << 10, True), ((256 << 10) + 1, False)])
def test_a_tokens_answer_has_a_bound(size: int, good: bool) -> None:
    def padded(answer: faulty.Answer) -> None:
        answer.body += b" " * (size - len(answer.body))
        answer.send()

    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        registry.token_fault = padded
        client = with_password(registry)
        if good:
            assert read(client, registry) == WANTED
        else:
            with pytest.raises(RegistryError, match=f"longer than {256 << 10} bytes"):
                read(client, registry)
        client.close()


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_wrong_password_and_none(auth: str) -> None:
    with faulty_registry(auth=auth) as registry:
        registry.add_blob(DATA)
        wrong = RegistryClient(credentials(registry, "not this one"), deadline_s=DEADLINE_S)
        none = RegistryClient(request_timeout_s=5, deadline_s=20)
        for one in (none, wrong):
            with pytest.raises(RegistryError) as caught:
                read(one, registry)
            assert_located(caught.value, registry)
            assert caught.value.status == 401
            assert not caught.value.temporary
            assert "not this one" not in str(caught.value)
            one.close()


def test_basic_password() -> None:
    with faulty_registry(auth="basic") as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        assert read(client, registry) == WANTED
        assert read(client, registry) == WANTED
        assert len(registry.requests) == 3  # refused once, then sent along
        client.close()


@pytest.mark.parametrize(
    "fault",
    [faulty.status(500), faulty.status(403), faulty.silence, faulty.drip, faulty.garbage, faulty.short_body(3)],
    ids=["500", "403", "silence", "drip", "not HTTP", "short"],
)
def test_token_server_fails(fault: faulty.Fault) -> None:
    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        registry.token_fault = fault
        client = RegistryClient(
            credentials(registry, registry.password), request_timeout_s=0.3, deadline_s=DEADLINE_S
        )
        started = time.monotonic()
        with pytest.raises(RegistryError, match=r"token|no answer in time|deadline passed") as caught:
            read(client, registry)
        assert time.monotonic() - started < DEADLINE_S + 30
        assert_located(caught.value, registry)
        client.close()


def test_nobody_waits_for_another_threads_token_beyond_his_deadline() -> None:
    with faulty_registry(auth="bearer") as registry:
        digest = registry.add_blob(DATA)
        registry.token_fault = faulty.silence
        client = RegistryClient(credentials(registry, registry.password), request_timeout_s=5, deadline_s=5)
        patient = threading.Thread(target=read, args=(client, registry))
        patient.start()
        while registry.tokens_issued == 0:
            time.sleep(0.01)
        with pytest.raises(RegistryError, match="no token within the deadline"):
            client.read_range(registry.repository(), digest, 0, 10, Call(time.monotonic() + 0.2))
        registry.token_fault = None
        registry.closing.set()
        patient.join()
        client.close()


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a\\nb"}', b"[" * 100_000])
def test_token_server_answers_nonsense(answer: bytes) -> None:
    def fault(good: faulty.Answer) -> None:
        good.body = answer
        good.send()

    with faulty_registry(auth="bearer") as registry:
        registry.add_blob(DATA)
        registry.token_fault = fault
        client = with_password(registry)
        with pytest.raises(RegistryError, match="no token"):
            read(client, registry)
        client.close()


@pytest.mark.parametrize("realm", ["ftp://x/", "http://[", "relative", "http:///no-host"])
def test_malformed_realm(realm: str) -> None:
    with faulty_registry(auth="bearer", realm=realm) as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        with pytest.raises(RegistryError, match="realm"):
            read(client, registry)
        client.close()


class Clock:
    """The time as the authenticator sees it, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("obdlab.registry.auth.time", clock)
    return clock


def test_a_token_is_renewed_before_it_expires(clock: Clock) -> None:
    with faulty_registry(auth="bearer", token_life_s=1000) as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        for ahead_s, token in ((0, 1), (890, 1), (910, 2), (1790, 2), (1830, 3)):
            clock.ahead_s = ahead_s
            assert read(client, registry) == WANTED
            assert registry.blob_requests()[-1].authorization == f"Bearer token-{token}"
            assert registry.tokens_issued == token
        # The first request was refused, and no later one.
        assert len(registry.blob_requests()) == 6
        client.close()


def test_while_a_token_is_renewed_others_go_on_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.registry.auth._EXPIRY_MARGIN", 0.9999)  # due after 0.1 s, good for 1000
    asked, answer = threading.Event(), threading.Event()

    def slow(reply: faulty.Answer) -> None:
        asked.set()
        assert answer.wait(60)
        reply.send()

    with faulty_registry(auth="bearer", token_life_s=1000) as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        assert read(client, registry) == WANTED
        registry.token_fault = slow
        time.sleep(0.15)
        results: list[bytes] = []
        renewing = threading.Thread(target=lambda: results.append(read(client, registry)))
        renewing.start()
        try:
            assert asked.wait(60)
            assert read(client, registry) == WANTED
            assert registry.blob_requests()[-1].authorization == "Bearer token-1"
        finally:
            answer.set()
            renewing.join(60)
        assert results == [WANTED]
        assert registry.blob_requests()[-1].authorization == "Bearer token-2"
        client.close()


def test_after_its_end_one_thread_renews_it_for_all(clock: Clock) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(reply: faulty.Answer) -> None:
        asked.set()
        assert answer.wait(60)
        reply.send()

    with faulty_registry(auth="bearer", token_life_s=1000) as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        clock.ahead_s = -1001  # deadlines are by the true time
        assert read(client, registry) == WANTED
        registry.token_fault = slow
        clock.ahead_s = 0
        results: list[bytes] = []
        readers = [threading.Thread(target=lambda: results.append(read(client, registry))) for _ in range(4)]
        for reader in readers:
            reader.start()
        try:
            assert asked.wait(60)
            time.sleep(0.2)  # time for the others to come to the lock
        finally:
            answer.set()
            for reader in readers:
                reader.join(60)
        assert results == [WANTED] * 4
        assert registry.tokens_issued == 2
        assert {request.authorization for request in registry.blob_requests()[2:]} == {"Bearer token-2"}
        client.close()


def test_a_token_that_cannot_be_renewed_yet_is_used_until_it_expires(clock: Clock) -> None:
    with faulty_registry(auth="bearer", token_life_s=1000) as registry:
        registry.add_blob(DATA)
        client = with_password(registry)
        assert read(client, registry) == WANTED
        registry.token_fault = faulty.status(503)
        clock.ahead_s = 950
        assert read(client, registry) == read(client, registry) == WANTED
        assert registry.tokens_issued == 2  # asked once, and not again by each request
        assert registry.blob_requests()[-1].authorization == "Bearer token-1"
        clock.ahead_s = 955
        assert read(client, registry) == WANTED
        assert registry.tokens_issued == 3
        registry.token_fault = None
        clock.ahead_s = 960
        assert read(client, registry) == WANTED
        assert registry.blob_requests()[-1].authorization == "Bearer token-4"
        client.close()
