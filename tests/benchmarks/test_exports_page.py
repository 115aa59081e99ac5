"""The docs page about a campaign of exports."""

from campaigns.exports_page import Page, as_markdown
from campaigns.rows import Row, best_outcomes

PAGE = Page(title="Decoders", text="A text.", command="python script.py", causes={"loops": "a loop over tokens"})
ROWS = [
    Row(name="late", exporter="torchscript", outcome="not exported", reason="\x1b[96mNo operator"),
    Row(name="late", exporter="dynamo", outcome="right"),
    Row(name="loops", exporter="torchscript", outcome="refused", reason="UnsupportedError: it loops - at `x`"),
    Row(name="none", exporter="torchscript", outcome="not built", reason="\x1b[96mNo module"),
]


def test_a_decoder_has_the_better_outcome_of_its_exports():
    assert best_outcomes(ROWS) == {"late": "right", "loops": "refused", "none": "not built"}


def test_a_wrong_export_is_never_made_up_for():
    assert best_outcomes([*ROWS, Row(name="late", exporter="torchscript", outcome="wrong")])["late"] == "wrong"


def test_the_page_says_why_decoders_are_not_right():
    page = as_markdown(PAGE, ROWS)
    assert "Of 3 decoders, by the better of both exporters: 1 right, 1 refused, 1 not built." in page
    assert "By dynamo (1): late." in page
    assert "| loops | it loops | a loop over tokens |" in page
    assert "| none | not built: No module | not tried |  |" in page
