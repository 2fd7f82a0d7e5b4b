import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError
from swarm_sdk.tools.corpus import MAX_PAGE_CHARS, MAX_SNIPPET_CHARS, Corpus, Page

CITIES = [
    Page("São Paulo", "A city in Brazil. Population: 12400232. It lies near Campinas."),
    Page("Brazil", "A country in South America. Its capital is Brasília."),
    Page("Brasília", "The capital of Brazil.\nElevation: 1079 m\nPopulation: 2207718."),
    Page("Campinas", "A city of Brazil, near São Paulo. " + "It has many parks. " * 20),
    Page("Peru", "A country whose capital is Lima."),
]
ODD = '"a AND" NEAR(b) title:c* ^d {e} + -(f OR "g" NOT h :: \\ \0 \ud800 é 日本'


@pytest.fixture(scope="module")
def corpus():
    return Corpus.from_pages(CITIES)


def titles(hits):
    return [hit.title for hit in hits]


def test_a_word_in_the_title_weighs_more_than_in_the_text(corpus):
    assert titles(corpus.search("Brazil"))[0] == "Brazil"


def test_a_page_that_the_query_names_comes_first_however_long_it_is():
    pages = [Page("Of", "word " * 3000), Page("Of 1 and all", "long " * 3000)]
    pages += [Page(f"Of {i}", "short") for i in range(20)]
    corpus = Corpus.from_pages(pages)
    assert titles(corpus.search("OF", 2))[0] == "Of"
    assert titles(corpus.search("short words of 1 and all?", 2)) == ["Of 1 and all", "Of 1"]


def test_a_question_about_a_page_finds_it_first(corpus):
    assert titles(corpus.search("population of Campinas"))[0] == "Campinas"
    assert titles(corpus.search("What is the capital of peru?"))[0] == "Peru"


def test_accents_case_and_word_endings_do_not_matter(corpus):
    assert titles(corpus.search("sao paulo"))[0] == "São Paulo"
    assert titles(corpus.search("BRASILIA"))[0] == "Brasília"
    assert set(titles(corpus.search("capitals"))) == {"Brazil", "Brasília", "Peru"}


def test_the_limit_holds_and_unrelated_pages_are_not_found(corpus):
    assert len(corpus.search("brazil", 2)) == 2
    assert corpus.search("brazil", 0) == []
    assert corpus.search("uranium") == []


def test_snippets_are_one_short_line_near_the_match(corpus):
    (hit,) = (hit for hit in corpus.search("Elevation") if hit.title == "Brasília")
    assert "Elevation: 1079 m" in hit.snippet
    for hit in corpus.search("city brazil parks"):
        assert len(hit.snippet) <= MAX_SNIPPET_CHARS
        assert "\n" not in hit.snippet


def test_a_page_found_by_its_title_shows_the_start_of_its_text(corpus):
    assert corpus.search("Peru")[0].snippet == "A country whose capital is Lima."


@given(st.text() | st.text(alphabet='"*^:(){}+-\\ ABNDORTENS\0\ud800') | st.just(ODD))
def test_any_text_is_a_query(corpus, query):
    hits = corpus.search(query)
    assert len(hits) <= 4
    assert set(titles(hits)) <= set(corpus.titles)
    corpus.page(query)


def test_operators_are_plain_words(corpus):
    assert titles(corpus.search('Peru NOT "capital'))[0] == "Peru"
    assert titles(corpus.search("title:Peru*"))[0] == "Peru"


def test_a_page_is_found_by_its_title_with_or_without_accents(corpus):
    assert corpus.page("Brasília") == CITIES[2]
    assert corpus.page("  BRASILIA ") == CITIES[2]
    assert corpus.page("Bras") is None


def test_an_exact_title_goes_before_a_folded_one():
    both = [Page("PERU", "shouted"), Page("peru", "whispered"), Page("Perú", "sung")]
    corpus = Corpus.from_pages(both)
    assert [corpus.page(page.title) for page in both] == both
    assert corpus.page("pErU") == both[0]


@pytest.mark.parametrize("title", ["", "  ", "two\nlines"])
def test_titles_must_be_one_line(title):
    with pytest.raises(ConfigError, match="one line of text"):
        Corpus.from_pages([Page(title, "text")])


def test_two_pages_of_one_title_are_refused():
    with pytest.raises(ConfigError, match="two pages are titled 'Peru'"):
        Corpus.from_pages([CITIES[4], CITIES[4]])


def test_threads_read_at_the_same_time(corpus):
    def read(_):
        return tuple(corpus.search("capital of Brazil")), corpus.page("peru")

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(200))) == {read(0)}


def test_eight_thousand_pages_are_indexed_in_a_moment():
    pages = [Page(f"Page {i}", f"word{i % 97} and word{i % 89} " * 20) for i in range(8000)]
    started = time.perf_counter()
    corpus = Corpus.from_pages(pages)
    assert time.perf_counter() - started < 5
    assert len(corpus) == 8000
    assert titles(corpus.search("Page 4711"))[0] == "Page 4711"


def test_a_folder_is_read_with_its_subfolders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").write_text("Plain words on copper.")
    (tmp_path / "sub" / "a.md").write_text("intro\n\n## On *iron* ##\n\nIron is a metal.")
    (tmp_path / "sub" / "b.HTML").write_text(
        "<html><head><title>Gold page</title><style>p {color: red}</style></head>"
        "<body><h1>On\n gold &amp; silver</h1><p>Gold is <b>heavy</b>.</p>"
        "<script>var hidden = 1 < 2;</script><ul><li>one</li><li>two</li></ul>"
        "<table><tr><td>Au</td><td>79</td></tr></table></body></html>"
    )
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    corpus = Corpus.from_folder(tmp_path)
    assert corpus.titles == ("notes", "On *iron*", "On gold & silver")
    assert corpus.num_skipped == 0
    assert corpus.page("On gold & silver").text == (
        "On gold & silver\nGold is heavy.\n- one\n- two\nAu | 79"
    )
    assert titles(corpus.search("heavy metal")) != []


def test_an_html_page_without_heading_takes_its_title_then_its_file_name(tmp_path):
    (tmp_path / "a.html").write_text("<title>Zinc</title><p>text")
    (tmp_path / "b.htm").write_text("<h1> </h1><p>text <br/> more")
    (tmp_path / "c.html").write_text("<h2>Tin</h2><p>text<svg><title>icon</title></svg></p>")
    corpus = Corpus.from_folder(tmp_path)
    assert corpus.titles == ("Zinc", "b", "Tin")
    assert corpus.page("b").text == "text\nmore"
    assert corpus.page("Zinc").text == "text"


def test_files_of_one_title_take_their_paths(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.md").write_text(f"# Same\n{name}")
    (tmp_path / "c.md").write_text("# a/x.md\nc")
    (tmp_path / "d.md").write_text("# Other\nd")
    assert Corpus.from_folder(tmp_path).titles == ("c.md", "Other", "a/x.md", "b/x.md")


def test_a_long_file_becomes_several_pages(tmp_path):
    paragraphs = [f"Paragraph {i} " + "with words " * 50 for i in range(40)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs) + "\n\n" + "x" * 9000)
    corpus = Corpus.from_folder(tmp_path)
    num_parts = len(corpus)
    assert corpus.titles[0] == f"long (part 1 of {num_parts})"
    parts = [corpus.page(title).text for title in corpus.titles]
    assert max(map(len, parts)) == MAX_PAGE_CHARS
    assert parts[1].startswith("Paragraph ")
    squeezed = "".join("".join(parts).split())
    assert squeezed == "".join("".join([*paragraphs, "x" * 9000]).split())


def test_files_that_are_no_text_are_counted(tmp_path):
    (tmp_path / "good.txt").write_text("\ufeffgood", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "binary.md").write_bytes(b"a\0b")
    (tmp_path / "empty.html").write_text("  ")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    corpus = Corpus.from_folder(tmp_path)
    assert corpus.num_skipped == 4
    assert corpus.page("good").text == "good"


@pytest.mark.parametrize("name", ["missing", "file.txt", "empty"])
def test_a_folder_without_documents_is_one_sentence(tmp_path, name):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "data.csv").write_text("a,b")
    with pytest.raises(ConfigError) as raised:
        Corpus.from_folder(tmp_path / name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_html_file_without_any_text_is_no_document(tmp_path):
    (tmp_path / "a.html").write_text("<script>only code</script>")
    with pytest.raises(ConfigError, match="holds no"):
        Corpus.from_folder(tmp_path)
