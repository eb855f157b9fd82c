"""Pieces of a choice: one for each token, each with what it is the end of."""

from grokctl.inference.generation import Ended, FinishReason, Generation, Stats, Token
from grokctl.serving.choices import Choice, joined
from grokctl.serving.completion_request import read_completion
from grokctl.serving.logprobs import TokenNames
from grokctl.serving.served_model import EncodedPrompt


def choice_of(**body):
    request = read_completion({"prompt": [5, 6], **body})
    prompt = EncodedPrompt(ids=(5, 6), text="ab" if body.get("echo") else "", offsets=(0, 1))
    return Choice(3, request, prompt, TokenNames(vocabulary=None))


def end(ids, text, reason=FinishReason.LENGTH):
    return Ended(
        Generation(prompt_tokens=2, seed=9, ids=ids, text=text, finish_reason=reason, stats=Stats())
    )


def test_tokens_of_several_turns_that_come_together_stay_apart():
    choice = choice_of()

    pieces = choice.take([Token(7, "x"), Token(8, "y"), Token(None, "z"), end((7, 8), "xyz")])

    assert [(piece.text, piece.ids, piece.made) for piece in pieces] == [
        ("x", [7], 1),
        ("yz", [8], 2),
    ]
    assert [piece.finish_reason for piece in pieces] == [None, "length"]
    assert choice.shown(pieces[1]) == {
        "index": 3,
        "text": "yz",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "seed": 9,
    }


def test_an_end_by_itself_is_a_piece_and_the_first_one_has_the_prompt():
    choice = choice_of(echo=True, max_tokens=0, return_token_ids=True)

    (piece,) = choice.take([end((), "")])

    assert (piece.text, piece.finish_reason, piece.made) == ("ab", "length", 0)
    assert choice.shown(piece)["prompt_token_ids"] == [5, 6]


def test_joined_pieces_are_the_whole():
    choice = choice_of(echo=True, logprobs=0)
    tokens = [Token(7, "", -1.0), Token(8, "c", -2.0)]
    pieces = [piece for token in tokens for piece in choice.take([token])]
    pieces += choice.take([end((7, 8), "c", FinishReason.STOP)])

    whole = joined(pieces)

    assert (whole.text, whole.ids, whole.finish_reason) == ("abc", [7, 8], "stop")
    assert whole.logprobs.tokens[-2:] == ["token_id:7", "token_id:8"]
    assert whole.logprobs.token_logprobs[-2:] == [-1.0, -2.0]
