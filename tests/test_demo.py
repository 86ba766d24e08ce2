"""Check what sasa-demo's page is told, what it refuses, that it stays on this machine, and that a browser shows it."""

import http.client
import io
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from driving_chromium import CHROMIUM, Tab
from PIL import Image
from running_commands import start

from sasa_train.config.compose import compose_config
from sasa_train.demo.answers import MAX_BYTES, Demo
from sasa_train.demo.server import Server, listen
from sasa_train.models import build_model
from sasa_train.trained import TrainedModel, load_trained
from sasa_train.visualize.capture import attention_layers, attention_of
from sasa_train.visualize.geometry import window_at

CPU = "trainer.device=cpu"
ROUNDED = {"rtol": 0, "atol": 1e-6}  # the page gets six decimal places


def drawing(size: tuple[int, int] = (30, 20), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(file, kind)
    return file.getvalue()


def without_attention() -> TrainedModel:
    config = compose_config(["data=digits", "model=conv_resnet26", "model.width=0.125", CPU])
    model = build_model(config.model, 10, 8).eval()
    return TrainedModel(Path("conv.pt"), {"classes": [*"0123456789"], "ema": None}, config, model, "raw")


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[[TrainedModel], Server]]:
    """Return a function that serves a model's page in a thread, on a free port."""
    servers = []

    def serve(trained: TrainedModel) -> Server:
        servers.append(listen("127.0.0.1", 0))
        servers[-1].demo = Demo(trained, 3)
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def served(serving, tiny_run) -> Server:
    return serving(load_trained(tiny_run, [CPU]))


def ask(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, str]:
    """Return the status, the headers and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET" if body is None else "POST", path, body, {"Host": "localhost"} | headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read().decode()


# ---- what the page is told


def test_the_page_shows_what_predict_and_attention_of_return(served, tiny_run, tmp_path):
    """The classes must be those of `predict`, and each head's weights the window of the pixel in that layer."""
    (tmp_path / "drawing.png").write_bytes(drawing())
    trained = load_trained(tiny_run, [CPU])
    status, _, body = ask(served, "/look?row=1&column=6", drawing())
    found = json.loads(body)
    assert (status, found["pixel"]) == (200, [1, 6])
    expected = trained.predict(tmp_path / "drawing.png", top=3)
    assert [name for name, _ in found["classes"]] == [name for name, _ in expected]
    torch.testing.assert_close([share for _, share in found["classes"]], [share for _, share in expected])
    with Image.open(tmp_path / "drawing.png") as image:
        _, weights = attention_of(trained.model, trained.transform(image)[None])
    assert [layer["name"] for layer in found["layers"]] == [*weights] == [*attention_layers(trained.model)]
    for layer in found["layers"]:
        name = layer["name"]
        window = window_at(attention_layers(trained.model)[name], weights[name][0], (1, 6), trained.input_size[1:])
        torch.testing.assert_close(torch.tensor(layer["heads"]), window.weights, **ROUNDED)
        assert (tuple(layer["box"]), tuple(layer["query"])) == (window.box, window.query_box)


def test_a_picture_without_a_pixel_is_asked_at_its_centre(served):
    found = json.loads(ask(served, "/look", drawing())[2])
    assert found["pixel"] == [4, 4] and found["image"].startswith("data:image/png;base64,")
    assert found["layers"] == json.loads(ask(served, "/look?row=4&column=4", drawing())[2])["layers"]


def test_a_model_without_attention_says_so_and_shows_classes(serving):
    server = serving(without_attention())
    about = json.loads(ask(server, "/model")[2])
    assert "conv_resnet26 has no local self-attention of ours" in about["note"]
    found = json.loads(ask(server, "/look", drawing())[2])
    assert len(found["classes"]) == 3 and found["layers"] == []


def test_visitors_at_the_same_time_each_get_their_own_answer(served):
    """All share one model, whose layers are watched: without turns, one visitor would get another's weights."""
    paths = [f"/look?row={n}&column={7 - n}" for n in range(8)]
    alone = [ask(served, path, drawing()) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: ask(served, path, drawing()), paths))
    assert [json.loads(body) for *_, body in together] == [json.loads(body) for *_, body in alone]


# ---- what is refused


@pytest.mark.parametrize(
    "path,body,headers,status,message",
    [
        ("/look", b"a shopping list", {}, 400, r"cannot be read as an image \(cannot identify image file\)"),
        ("/look", b"", {}, 400, "cannot be read as an image"),
        ("/look", drawing((300, 300), "BMP")[:1000], {}, 400, "cannot be read as an image"),
        ("/look", drawing((300, 300), "JPEG")[:-900] + b"\xff\xd9", {}, 400, "it ends before its last pixels"),
        (
            "/look?row=8&column=0",
            drawing(),
            {},
            400,
            "pixel 8,0 must lie in the image as the model sees it, 0,0 to 7,7",
        ),
        ("/look?row=-1&column=0", drawing(), {}, 400, "row=-1 and column=0 must be whole numbers"),
        ("/look?row=1", drawing(), {}, 400, "row=1 and column= must be whole numbers"),
        ("/look", b"", {"Content-Length": str(MAX_BYTES + 1)}, 413, "has 67108865 bytes; at most 67,108,864 are taken"),
        ("/look", b"", {"Content-Length": "many"}, 411, "Content-Length=many must be the file's size"),
        ("/elsewhere", b"", {}, 404, "there is no /elsewhere"),
        ("/../answers.py", None, {}, 404, "there is no"),
        ("/model", None, {"Host": "elsewhere.example:7860"}, 403, "Host elsewhere.example must be one of 127.0.0.1"),
        ("/look", drawing(), {"Host": "["}, 403, "must be one of 127.0.0.1"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(served, path, body, headers, status, message):
    found = ask(served, path, body, **headers)
    assert found[0] == status and re.search(message, json.loads(found[2])["error"])


def test_a_loopback_address_of_any_spelling_answers_to_local_names_alone(served):
    with listen("127.0.0.2", 0) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.2", server.server_port, timeout=60)
        connection.request("GET", "/model", headers={"Host": "elsewhere.example"})
        assert connection.getresponse().status == 403


def test_a_model_that_is_not_finite_is_an_error_not_a_picture(serving, tiny_run, capsys):
    trained = load_trained(tiny_run, [CPU])
    with torch.no_grad():
        next(trained.model.parameters()).fill_(float("nan"))
    status, _, body = ask(serving(trained), "/look", drawing())
    assert status == 500 and "is the model finite?" in json.loads(body)["error"]
    assert "WARNING" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_host_that_is_not_ours_are_refused(in_process, tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        said = in_process("demo", str(tiny_run), "--port", str(number), expect=2).stderr
    assert f"--host 127.0.0.1 --port {number}: the port is taken; add --port " in said
    assert 0 <= int(said.rsplit(" ", 1)[1]) <= 65535 and not said.endswith(f" {number}\n")
    said = in_process("demo", str(tiny_run), "--host", "192.0.2.1", "--port", "0", expect=2).stderr  # for examples
    assert "--host 192.0.2.1 --port 0: " in said and "must be an address of this machine" in said
    assert "70000 must be a whole number, at most 65535" in in_process("demo", "x", "--port", "70000", expect=2).stderr
    said = in_process("demo", "outputs/RUN", "--port", "0", expect=2).stderr
    assert "outputs/RUN: cannot be read" in said


# ---- what it sends, and how it ends


def test_the_page_has_all_it_needs_and_may_load_nothing_from_elsewhere(served):
    for path in ("/", "/page.js"):
        status, headers, body = ask(served, path)
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert not re.search(r"\w+://|url\(|@import", body)


def test_the_command_says_where_the_page_is_and_ctrl_c_ends_it(tiny_run, tmp_path):
    process = start(tmp_path, str(tiny_run), "--port", "0", CPU, command="demo")
    assert process.stdout.readline() == "loading PyTorch ...\n"
    line = process.stdout.readline()
    found = re.fullmatch(r".*/tiny: the page is http://127\.0\.0\.1:(\d+)  \(Ctrl-C ends it\)\n", line)
    assert found, line + process.communicate(timeout=60)[0]
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("POST", "/look", drawing())
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[0], process.returncode) == ("ended\n", 0)


def test_a_browser_is_opened_only_if_asked_and_one_that_is_missing_is_said(in_process, tiny_run, monkeypatch):
    opened = []

    def stop(self: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", stop)
    monkeypatch.setattr("webbrowser.open", opened.append)  # returns None: there is no browser
    in_process("demo", str(tiny_run), "--port", "0", CPU)
    assert opened == []
    done = in_process("demo", str(tiny_run), "--port", "0", "--open", CPU)
    assert opened == re.findall(r"http://127\.0\.0\.1:\d+", done.stdout) and len(opened) == 1
    assert done.stderr == f"WARNING: no browser could be opened; open {opened[0]} yourself\n"


# ---- in a browser


@pytest.fixture
def tab(tmp_path) -> Iterator[Tab]:
    tab = Tab(tmp_path / "profile")
    yield tab
    tab.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look at the page with")
def test_a_browser_shows_a_dropped_picture_and_where_a_clicked_pixel_looks(served, serving, tab, tmp_path):
    """At 1280 and 500 pixels: drop, click a pixel, choose a layer, give a file that is not an image."""
    (tmp_path / "drawing.png").write_bytes(drawing())
    (tmp_path / "list.txt").write_text("eggs, milk")
    with open(tmp_path / "film.mov", "wb") as film:
        film.truncate(MAX_BYTES + 1)
    layers = [*served.demo.layers]
    for width in (1280, 500):
        tab.open(served.url, width)
        tab.wait_for("typeof about === 'object' && at('about').textContent")
        tab.drop_file("#drop", tmp_path / "drawing.png")
        assert tab.wait_for("document.querySelectorAll('#classes li').length") == 3
        assert tab.value("answer.pixel") == [4, 4] and "Pixel 4,4 is chosen" in tab.value("at('pixel').textContent")
        tab.click("#picture", across=6.5 / 8, down=1.5 / 8)
        tab.wait_for("answer.pixel.join() === '1,6'")
        assert tab.value("[...at('layers').children].map(one => one.dataset.layer)") == layers
        tab.click("#layers button:first-child")
        assert tab.value("at('layer').textContent").startswith(f"Heads of {layers[0]},")
        heads = tab.value("[...at('heads').children].map(one => one.innerText.split('\\n')[0])")
        assert heads == [f"head {n}" for n in range(served.demo.layers[layers[0]].num_heads)]
        tab.choose_file("#file", tmp_path / "list.txt")
        said = tab.wait_for("at('said').className === 'wrong' && at('said').textContent")
        assert said == "list.txt: cannot be read as an image (cannot identify image file)"
        tab.choose_file("#file", tmp_path / "film.mov")
        tab.wait_for("at('said').textContent === 'film.mov: has 65 MiB; at most 64 MiB are taken'")
        assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    tab.console.clear()  # a browser prints a line about the answer 400
    tab.open(serving(without_attention()).url, 1280)
    assert "no local self-attention" in tab.wait_for("typeof about === 'object' && at('note').textContent")
    tab.choose_file("#file", tmp_path / "drawing.png")
    assert tab.wait_for("document.querySelectorAll('#classes li').length") == 3
    assert tab.value("at('attention').hidden") is True
    assert tab.console == []
    asked = {url.split(":")[0] + ":" + url.split(":")[1] for url in tab.requests if not url.startswith("data:")}
    assert asked == {"http://127.0.0.1"}
