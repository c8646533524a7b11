"""wikitext: prose stays, markup goes, and nothing makes it fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources.wikitext import WikiText

MARKUP = """{{ }} {{{ }}} [[ ]] | = == ''' '' <ref> </ref> <ref/> <br> <div> </div> {| |- |} <!--
--> [http://a b] &nbsp; &#233; * # ; : convert lang File: Category: word ( , ) See also __TOC__"""


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        ("''[[Time]]'''s cover, the '''cat'''s, ''''x''''", "Time's cover, the cats, 'x'"),
        ("A [[cat]]s and [[Felis|other cats]].", "A cats and other cats."),
        ("See [[:Category:A]], [[a|b|c]], [[Paris#B|]].", "See Category:A, b|c, Paris#B."),
        ("[[File:a.jpg|thumb|A [[nested]] caption]]Text", "Text"),
        ("[[Category:Cats]]\n[[category: Dogs|x]][[Image:b.png]]\nText", "Text"),
        ("[[Datei:a.jpg|mini|Ein Bild]]Text [[Bild:b.PNG]]", "Text"),
        ("Text\n[[de:Katze]]\n[[zh-min-nan:Niau]]", "Text"),
        ("[[Star Trek: First Contact]]", "Star Trek: First Contact"),
        ("A [http://a.b site], number [http://a.b] and http://a.b x", "A site, number and x"),
        ("Said.<ref name=x>{{cite|a=[[b]]}}</ref> More<ref name=x /> text.", "Said. More text."),
        ("A<!-- hidden -->B {{infobox|a={{b}}|c=[[d]]}}C", "AB C"),
        ("{| class=x\n! head\n|-\n| {{a}} cell [[b]]\n{|\n| inner\n|}\n|}\nText", "Text"),
        ("{| class=x\n|-\n| never closed\nText", "Text"),
        ("* one\n** two\n# three\n; term\n: meaning", "one\ntwo\nthree\nterm\nmeaning"),
        ("a<br>b<br/>c<p>d</p>e", "a\nb\nc\nd\ne"),
        ("H<sub>2</sub>O <span style='{{x}}'>is</span> <nowiki>[[so]]</nowiki>", "H2O is [[so]]"),
        ("It is <math>x^2</math>, as <code>x</code>", "It is, as x"),
        ("<gallery>\nFile:a.jpg|x\n</gallery>Text<timeline>a</timeline>", "Text"),
        ("Caf&eacute;&#33; &#x41;&amp;B&nbsp;C", "Caf\u00e9! A&B C"),
        ("Lead\n== Head ==\nBody\n=== Sub ===\nMore", "Lead\nBody\nMore"),
        ("A\n==See also==\n* B\n===Notes===\nC\n==Life==\nD\n== External  links ==\nE", "A\nD"),
        ("=== ''References'' ===\nA\n=== Life ===\nB", "B"),
        ("__NOTOC__\n----\n{{{1|x}}}\n...\nText", "Text"),
        ("X ({{IPAc-en|a}}; {{respell|b}}) is", "X is"),
        ("X ({{IPAc-en|a}}, born 1900) has {{chem|a}}, {{chem|b}}, and", "X (born 1900) has, and"),
        ("Run {{convert|1300|mi|km|abbr=on}}, {{cvt|5|to|7|kg}}.", "Run 1300 mi, 5 to 7 kg."),
        ("From {{lang|grc|''x'' [[y]]}} or {{lang-ru|z}} {{transl|ar|ISO|t}}", "From x y or z t"),
        ("{{nowrap|a {{small|b}}}} {{lang|de}} {{lang|de|t=x}}", "a b"),
        ("A \0 b", "A b"),
        ("#REDIRECT not handled here", "REDIRECT not handled here"),
        ("{{unclosed [[brackets", "{{unclosed [[brackets"),
        ("", ""),
    ],
)  # fmt: skip
def test_prose_of(wikitext: str, prose: str) -> None:
    assert WikiText(frozenset({"Datei", "Kategorie"})).prose(wikitext) == prose


@given(st.lists(st.sampled_from([*MARKUP.split(), "\n", " ", "\u00e9", "\0"]), max_size=60))
def test_any_markup_gives_lines_with_words(pieces: list[str]) -> None:
    prose = WikiText().prose("".join(pieces))
    assert "\0" not in prose
    assert "''" not in prose
    for line in prose.split("\n") if prose else []:
        assert line == " ".join(line.split())
        assert any(character.isalnum() for character in line)


def test_deep_nesting_ends() -> None:
    for opening, closing in (
        ("{{a|", "}}"),
        ("[[a|", "]]"),
        ("<div>", "</div>"),
        ("{{lang|de|", "}}"),
    ):
        WikiText().prose(opening * 3000 + "word" + closing * 3000)  # fmt: skip


def test_the_tokenizer_in_python_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A [[b|c]] {{convert|1|km}}<ref>x</ref> &amp; ''d''\n== See also ==\n* e"
    expected = WikiText().prose(text)
    monkeypatch.setitem(__import__("sys").modules, "mwparserfromhell.parser._tokenizer", None)
    assert WikiText().prose(text) == expected == "A c 1 km & d"
