"""Three small tasks for lm-evaluation-harness, which nothing has to be fetched for."""

from datasets import Dataset

TEXTS = ["the sea is", "the sun and", "one two", "wind and the", "é is"]


def choices(**_):
    rows = [
        {"text": text, "choices": [" deep", " the sea", " one"], "answer": number % 3}
        for number, text in enumerate(TEXTS)
    ]
    return {"test": Dataset.from_list(rows)}


def answers(**_):
    rows = [{"text": text, "answer": "deep"} for text in TEXTS]
    return {"test": Dataset.from_list(rows)}


def texts(**_):
    rows = [{"text": f"{text} deep and the wind is one of the sea"} for text in TEXTS]
    return {"test": Dataset.from_list(rows)}
