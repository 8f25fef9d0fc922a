"""Requests that nobody would send on purpose: damaged images, forms and headers, and what schemathesis makes of the
document. Every one has an answer of the contract, and the server is as it was before."""

import asyncio
import io
import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
from process_cases import ask, http, post, started
from server_cases import picture

from companion import models

MIB = 1 << 20
REFUSALS = {400, 405, 404, 408, 411, 413, 414, 415, 417, 422, 426, 431, 501}
# What means something to a parser: ends of lines, of strings and of numbers, lengths, and names it may look up.
TOKENS = [
    *(
        b"\r\n\r\n",
        b"\r\n",
        b"\n",
        b"--",
        b"--end--",
        b"\0",
        b'"',
        b";",
        b"=",
        b"%00",
        b"\xff\xff\xff\xff",
        b"\xd8\xff",
    ),
    *(b"IHDR", b"IDAT", b"IEND", b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"acTL", b"RIFF", b"WEBP", b"\x7f\xff\xff\xff"),
    *(
        b"-1",
        b"0",
        b"99999999999999999999",
        b"1e9",
        b"chunked",
        b"charset=punycode",
        b"charset=undefined",
        b"filename=",
    ),
    *(
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: websocket\r\n",
    ),
    *(
        b"Connection: upgrade\r\n",
        b"Content-Type: image/gif\r\n",
        b"application/json",
        b'{"texts": [null, 1e999, "\\ud800"]}',
    ),
]


def animation():
    from PIL import Image

    file = io.BytesIO()
    frames = [Image.open(io.BytesIO(picture(seed))) for seed in range(3)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def well_formed():
    """Content types and bodies as they should be."""
    files = [picture(seed, side, form) for seed, (side, form) in enumerate([(32, "PNG"), (90, "JPEG"), (16, "BMP")])]
    parts = b"".join(
        b'--end\r\nContent-Disposition: form-data; name="files"; filename="%d"\r\nContent-Type: image/png\r\n\r\n'
        % number
        + file
        + b"\r\n"
        for number, file in enumerate(files)
    )
    return [
        *(("image/png", picture(seed, 8 + seed)) for seed in range(4)),
        ("image/jpeg", picture(5, 64, "JPEG")),
        ("image/webp", picture(6, 40, "WEBP")),
        ("image/bmp", picture(7, 12, "BMP")),
        ("image/gif", animation()),
        ("multipart/form-data; boundary=end", parts + b"--end--\r\n"),
        ("application/json", json.dumps({"texts": ["one", "two"]}).encode()),
        ("application/x-www-form-urlencoded", b"files=a&files=b"),
    ]


def mutated(data, random, others):
    """``data`` with a few faults."""
    data = bytearray(data)
    for _ in range(random.integers(1, 5)):
        first, last = sorted(random.integers(0, len(data) + 1, 2).tolist())
        last = min(last, first + int(random.integers(1, 200)))
        match random.integers(0, 7):
            case 0 if data:  # a bit
                data[random.integers(len(data))] ^= 1 << random.integers(8)
            case 1:
                del data[first:last]
            case 2:
                data[first:first] = data[first:last]
            case 3:
                data[first:last] = random.bytes(last - first)
            case 4:
                data[first:first] = TOKENS[random.integers(len(TOKENS))]
            case 5:  # the rest of another
                other = others[random.integers(len(others))]
                data[first:] = other[random.integers(len(other)) :]
            case 6:
                del data[first:]
    return bytes(data)


def requests(count, seed):
    """Whole requests with faults in the body, in the head, or in what the head says of the body."""
    random = np.random.default_rng(seed)
    kinds, bodies = zip(*well_formed(), strict=True)
    for _ in range(count):
        number = random.integers(len(bodies))
        kind, body = kinds[number], bodies[number]
        chance = random.random()
        if chance < 0.1:
            whole = http(kind, body)
            ends = whole.index(b"\r\n\r\n") + 4
            yield mutated(whole[:ends], random, [whole]) + body
            continue
        if chance < 0.2:
            kind = mutated(kind.encode(), random, TOKENS).decode("latin-1")
            kind = "".join(letter for letter in kind if letter.isprintable())
        if chance < 0.25:
            kind = kinds[random.integers(len(kinds))]
        yield http(kind, mutated(body, random, bodies))


async def status_of(address, request):
    """How a request ends: a status, or ``cut`` when the server closes the connection; never in silence."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(60):
            try:
                async with asyncio.timeout(3):
                    return (await ask(reader, writer, request))[0]
            except TimeoutError:  # it may wait for more
                writer.write_eof()
                await reader.read()
                return "cut"
    except (asyncio.IncompleteReadError, ConnectionError):
        return "cut"
    finally:
        writer.close()


def endings(server, made, concurrency=16):
    """Ending → how often, of requests that are sent by so many clients."""
    made, seen = iter(made), Counter()

    async def client():
        for request in made:
            ending = await status_of(server.address, request)
            seen[ending] += 1
            assert ending == "cut" or ending == 200 or ending in REFUSALS, (ending, request)

    async def main():
        await asyncio.gather(*(client() for _ in range(concurrency)))

    asyncio.run(main())
    return seen


@pytest.fixture(scope="module")
def server(tmp_path_factory, network):
    folder = tmp_path_factory.mktemp("fuzz")
    models.save(network, folder / "m.safetensors")
    with started(folder, folder / "m.safetensors", max_bytes=1 << 20, body_seconds=1) as server:
        answer = post(server.url, picture(1)).json()
        yield server
        assert post(server.url, picture(1)).json() == answer
        assert server.stop() == 0
        assert [line for line in server.faults() if "Traceback" in line] == []


def test_mutated_requests(server):
    seen = endings(server, requests(400, seed=0))
    assert seen.total() == 400
    assert seen[200] > 20  # some faults do not matter
    assert seen[400] > 100


@pytest.mark.stress
@pytest.mark.timeout(1200)
def test_ten_thousand_mutated_requests(server):
    warm = endings(server, requests(2500, seed=1))
    memory = server.rss()
    seen = endings(server, requests(7500, seed=2))
    assert (warm + seen).total() == 10_000
    assert server.rss() - memory < 48 * MIB


def sample(operation, mode, examples, agrees):
    """Send examples of an operation, and hold each answer against the document: status → how often."""
    from hypothesis import HealthCheck, given, settings

    seen = Counter()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case):
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=agrees)

    conforms()
    return seen


@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=[pytest.mark.stress, pytest.mark.timeout(1200)])])
def test_what_schemathesis_makes_of_the_document(server, examples):
    """No server error, and every answer as the document says."""
    import schemathesis
    from hypothesis import strategies as st
    from schemathesis.checks import CHECKS

    files = st.builds(picture, st.integers(0, 99), st.integers(1, 64)) | st.binary(max_size=500)
    for kind in ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"):
        schemathesis.openapi.media_type(kind, files)
    conformance = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    as_said, contradicting = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    agrees = [CHECKS.get_one(name) for name in ("not_a_server_error", *conformance)]
    operations = {found.ok().label: found.ok() for found in document.get_all_operations()}
    assert {"POST /predict", "GET /live", "GET /ready", "GET /metrics"} <= operations.keys()
    for label, operation in operations.items():
        seen = sample(operation, as_said, examples, agrees)
        assert seen[404 if "{" in label else 200], (label, seen)  # hardly a model's name by chance
    seen = sample(operations["POST /predict"], contradicting, examples, agrees)
    assert seen.keys() <= {400, 415, 422}
