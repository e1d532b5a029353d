# SPDX-License-Identifier: Apache-2.0
"""The text classification sets of continual learning: what they ask, their label words and their columns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextTask:
    """A data set of texts in classes.

    type: the key of its instruction, and its folder in the layout "cl_benchmark". words: the label words in
    the order of the numbers in files. csv, parquet: how the columns of a row become a text; None where the
    set is not distributed in this form. label: the column of the label in parquet files.
    """

    type: str
    words: tuple[str, ...]
    csv: tuple[tuple[str, ...], str] | None = None
    parquet: str | None = None
    label: str = "label"
    folder: str = ""  # of the CSV files


RATINGS = ("very negative", "negative", "neutral", "positive", "very positive")
TRUTH = ("False", "True")
SENTIMENT = ("Bad", "Good")
_TITLED = "Title: {title}\nText: {content}\n"
_PAIR = "sentence 1: {premise}\nsentence 2: {hypothesis}"

TASKS: dict[str, TextTask] = {
    "agnews": TextTask(
        "TC",
        ("World", "Sports", "Business", "Science or Technology"),
        (("title", "content"), _TITLED),
        "Text: {text}\n",
        folder="ag_news_csv",
    ),
    "amazon": TextTask(
        "SC", RATINGS, (("title", "content"), _TITLED), _TITLED, folder="amazon_review_full_csv"
    ),
    "yelp": TextTask(
        "SC", RATINGS, (("text",), "Text: {text}\n"), "Text: {text}\n", folder="yelp_review_full_csv"
    ),
    "dbpedia": TextTask(
        "TC",
        (
            "Company", "Educational Institution", "Artist", "Athlete", "Office Holder",
            "Mean of Transportation", "Building", "Natural Place", "Village", "Animal", "Plant", "Album",
            "Film", "Written Work",
        ),
        (("title", "content"), _TITLED),
        _TITLED,
        folder="dbpedia_csv",
    ),
    "yahoo": TextTask(
        "TC",
        (
            "Society & Culture", "Science & Mathematics", "Health", "Education & Reference",
            "Computers & Internet", "Sports", "Business & Finance", "Entertainment & Music",
            "Family & Relationships", "Politics & Government",
        ),
        (
            ("question_title", "question_content", "best_answer"),
            "Title: {question_title}\nText: {question_content} {best_answer}\n",
        ),
        "Title: {question_title}\nText: {question_content} {best_answer}\n",
        label="topic",
        folder="yahoo_answers_csv",
    ),
    "MNLI": TextTask("NLI", ("entailment", "neutral", "contradiction"), parquet=_PAIR),
    "CB": TextTask("NLI", ("entailment", "contradiction", "neutral"), parquet=_PAIR),
    "RTE": TextTask("NLI", ("entailment", "contradiction"), parquet=_PAIR),
    "QQP": TextTask(
        "QQP", TRUTH, parquet="first sentence: {question1}\nsecond sentence: {question2}"
    ),
    "SST-2": TextTask("SC", SENTIMENT, parquet="Text: {sentence}"),
    "IMDB": TextTask("SC", SENTIMENT, parquet="{text}"),
    "BoolQA": TextTask("BoolQA", TRUTH, parquet="question: {question}\npassage: {passage}"),
    "MultiRC": TextTask(
        "MultiRC",
        TRUTH,
        parquet="paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}",
    ),
    "WiC": TextTask("WiC", TRUTH, parquet="word: {word}\n{sentence1}\n{sentence2}"),
    "COPA": TextTask(
        "COPA",
        ("A", "B"),
        parquet=(
            'Which sentence is the {question} of "{premise}"? Choose one between A and B.\n'
            "A: {choice1}\nB: {choice2}"
        ),
    ),
}  # fmt: skip

# The published orders: 1 to 3 of the standard benchmark, 4 to 6 of the long one.
ORDERS: dict[int, tuple[str, ...]] = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
    4: (
        "MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB", "yelp", "amazon", "SST-2", "dbpedia",
        "agnews", "MultiRC", "yahoo",
    ),
    5: (
        "MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews",
        "yelp", "amazon", "yahoo",
    ),
    6: (
        "yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews", "yahoo",
        "MultiRC", "BoolQA", "WiC",
    ),
}  # fmt: skip
