"""The page asks nothing of other servers, and what it computes is right, as Node runs it."""

import json
import re
import shutil
import subprocess

import pytest
from places import PROJECT

STATIC = PROJECT / "grokctl" / "serving" / "static"
FILES = sorted(STATIC.iterdir())


def test_the_page_is_small_and_made_of_files_alone():
    assert sum(path.stat().st_size for path in FILES) < 60_000
    html = (STATIC / "index.html").read_text()
    assert "<style" not in html
    assert " style=" not in html
    assert re.findall(r"<script[^>]*>", html) == ['<script type="module" src="app.js">']
    assert not re.findall(r" on[a-z]+=", html)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_no_text_becomes_a_page(path):
    text = path.read_text()

    assert set(re.findall(r"https?://[^\"'\s]*", text)) <= {"http://www.w3.org/2000/svg"}
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in text


def test_every_field_has_a_label_and_every_name_is_there():
    html, script = (STATIC / "index.html").read_text(), (STATIC / "app.js").read_text()
    ids = re.findall(r' id="([^"]+)"', html)

    assert len(ids) == len(set(ids))
    assert set(re.findall(r'field\("([^"]+)"\)', script)) <= set(ids)
    for kind in ("input", "textarea", "select"):
        for found in re.findall(rf"<{kind}[^>]* id=\"([^\"]+)\"", html):
            labelled = f'for="{found}"' in html
            inside = re.search(rf'<label[^>]*>(?:(?!</label>).)*id="{found}"', html, re.DOTALL)
            assert labelled or inside, found


def node(code):
    """What an expression over the page's functions gives."""
    if shutil.which("node") is None:
        pytest.skip("no Node here")
    source = (STATIC / "core.js").read_text()
    script = f"{source}\nconsole.log(JSON.stringify((() => {{ {code} }})()));"
    command = ["node", "--input-type=module", "--eval", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_however_they_are_cut(size):
    events = [{"choices": [{"text": "a\u2028\n\n<é😀"}]}, {"choices": []}, "[DONE]"]
    lines = [each if each == "[DONE]" else json.dumps(each) for each in events]
    stream = ": queued\n\n" + "".join(f"data: {line}\n\n: reading 1/2\n\n" for line in lines)

    found = node(
        f"const said = []; const parser = new EventParser((words) => said.push(words));"
        f"const stream = {json.dumps(stream)}; const values = [];"
        f"for (let at = 0; at < stream.length; at += {size})"
        f"  values.push(...parser.push(stream.slice(at, at + {size})));"
        "return [values, said];"
    )

    assert found == [events, ["queued", *["reading 1/2"] * 3]]


def token(id_, name, data, logprob=-1.0):
    return {"id": id_, "token": name, "bytes": list(data), "logprob": logprob, "top_logprobs": []}


def test_tokens_inside_a_character_are_shown_once():
    parts = [token(1, " a", b" a")]
    parts += [token(2 + place, "bytes:", bytes([byte])) for place, byte in enumerate("😀".encode())]
    parts += [token(9, "</s>", b""), token(10, "bytes:", b"\xff"), token(11, "b", b"b")]

    found = node(
        f"return groups({json.dumps(parts)}).map((each) => [each.text, each.tokens.length])"
    )

    assert found == [[" a", 1], ["😀", 4], ["</s>", 1], ["\ufffd", 1], ["b", 1]]


def test_a_branch_is_what_came_before_and_the_other_token():
    step = {"promptIds": [5, 6], "tokens": [token(7, "a", b"a"), token(8, "b", b"b")]}

    assert node(f"return branch({json.dumps(step)}, 1, 99)") == [5, 6, 7, 99]
    assert node(f"return branch({json.dumps(step)}, 0, 99)") == [5, 6, 99]


def test_undo_and_redo_are_each_other():
    found = node(
        "const history = new History(2); history.add('a'); history.add('b'); history.add('c');"
        "return [history.undo('d'), history.undo('c'), history.undo('b') ?? null,"
        " history.redo('b'), history.redo('c'), history.redo('d') ?? null]"
    )

    assert found == ["c", "b", None, "c", "d", None]


def test_numbers_for_people():
    assert node("return [0, -0.1, -3, -30, null].map(shade)") == [10, 9, 0, 0, 10]
    assert node("return [percent(0.0001), percent(-1), percent(-12)]") == [
        "100.0%",
        "36.8%",
        "6.1e-4%",
    ]
    assert node(
        "return perplexity([{logprob: null}, {logprob: -1}, {logprob: -3}])"
    ) == pytest.approx(7.389056)
    assert node("return perplexity([{logprob: null}])") is None


def test_a_request_has_what_was_typed():
    settings = {"max_tokens": 5, "seed": None, "temperature": 0, "stop": []}
    body = node(f"return bodyOf([1, 2], {json.dumps(settings)})")

    assert body["prompt"] == [1, 2]
    assert body["temperature"] == 0
    assert "seed" not in body
    assert "stop" not in body
    assert body["return_token_ids"] is body["stream"] is True
    assert node(r"return stopTexts('a\\nb\n\nc')") == ["a\nb", "c"]


def test_a_copied_command_is_safe_to_paste():
    body = {"prompt": "it's $HOME `x`\n", "max_tokens": 3, "stream": True, "top_k": 4}
    command = node(f"return asCurl('http://h/v1/completions', {json.dumps(body)})")
    printed = subprocess.run(
        ["sh", "-c", command.replace("curl ", "printf '%s\\n' ", 1)],
        capture_output=True,
        text=True,
        check=True,
    )

    sent = json.loads(printed.stdout.splitlines()[-1])
    assert sent["prompt"] == body["prompt"]
    assert sent["stream"] is False
    python = node(f"return asPython('http://h/v1', 'grok', {json.dumps(body)})")
    compile(python, "copied", "exec")
    assert '"top_k": 4' in python


def test_comments_of_a_stream_are_words():
    comments = ["queued", "queued 0", "queued 12", "reading 16/80", "writing", "something new"]

    assert node(f"return {json.dumps(comments)}.map(inWords)") == [
        "Waiting …",
        "Next in the queue …",
        "12 in the queue before …",
        "Reading: 16 of 80 tokens …",
        "Writing …",
        "Waiting …",
    ]
