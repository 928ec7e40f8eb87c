"""Corpora from archives and from the hub, against a server in this process that speaks HTTP ranges
and the hub's API."""

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, refuses, run
from test_data import corpora as write_corpora
from test_data import directions, sizes

from data import LANGUAGES, all_directions, prepare
from support import corpora
from support.corpora import clean, download, fetch
from support.runs import UserError, file_sha256, lock_folder

pytestmark = pytest.mark.once

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAIRS = ["de-en", "en-is", "cs-en", "en-ru", "en-zh"]
CODES = [language.flores for language in LANGUAGES.values()]


class Handler(http.server.BaseHTTPRequestHandler):
    """`server.files`: path -> bytes. A path under /api lists a hub repository; /gated answers as
    the hub does."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.asked.append((self.path, self.headers.get("Range")))
        headers, status, path = {}, 200, self.path.partition("?")[0]
        if "gated" in path:
            status, data = 403, b"{}"
            headers = {
                "X-Error-Code": "GatedRepo",
                "X-Error-Message": "Access to this dataset is restricted",
            }
        elif path.startswith("/api/"):
            repository = path.split("/revision/")[0].removeprefix("/api/").removeprefix("models/")
            names = [
                p.split(f"/resolve/{COMMIT}/")[1]
                for p in self.server.files
                if p.startswith(f"/{repository}/resolve/")
            ]
            data = json.dumps(
                {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            ).encode()
            status = 200 if names else 404
            headers = {} if names else {"X-Error-Code": "RepoNotFound"}
        elif path in self.server.files:
            data = self.server.files[path]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            status, data = 404, b""
        length = len(data)
        if "Range" in self.headers and status == 200 and self.server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            if start >= length:
                status, data, length = 416, b"", 0
            else:
                status, data, length = 206, data[start:], length - start
                headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{start + length}"
        self.send_response(status)
        for key, value in {
            **headers,
            **({"Content-Length": str(length)} if self.server.lengths else {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: self.server.cut])


@pytest.fixture
def server():
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.asked, web.ranges, web.lengths, web.cut = {}, [], True, True, None
    web.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def texts(root):
    files = (
        p
        for part in (corpora.OPUS, corpora.FLORES)
        for p in (root / part).rglob("*")
        if p.is_file()
    )
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def archive(root, folder, prefix=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(root / folder, arcname=prefix + folder)
    return buffer.getvalue()


def test_a_stopped_download_goes_on_and_is_checked(server, tmp_path):
    data = os.urandom(3_000_000)
    server.files["/a.tar.gz"] = data
    url, path, known = (
        f"{server.url}/a.tar.gz",
        tmp_path / "a.tar.gz",
        (len(data), hashlib.sha256(data).hexdigest()),
    )
    server.cut = 1_200_000
    with pytest.raises(UserError, match="connection ended after 1200000 of 3000000 bytes"):
        download(url, path, *known)
    assert not path.exists()
    server.cut = None
    assert download(url, path, *known) == known[1] and path.read_bytes() == data
    assert server.asked[-1] == ("/a.tar.gz", "bytes=1200000-")
    count = len(server.asked)
    download(url, path, *known)  # whole and right: nothing is asked again
    assert len(server.asked) == count and sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.files["/a"], server.ranges = b"x" * 5000 + b"y", False
    (tmp_path / "a.part").write_bytes(b"z" * 100)
    download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == server.files["/a"]


def test_servers_that_say_no_length_and_parts_that_are_too_long(server, tmp_path):
    server.files["/a"] = b"x" * 5000
    (tmp_path / "a.part").write_bytes(b"z" * 6000)  # 416, then anew
    download(f"{server.url}/a", tmp_path / "a")
    server.lengths = False
    download(f"{server.url}/a", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == server.files["/a"]


def test_wrong_bytes_and_no_answer(server, tmp_path):
    server.files["/a"] = b"not the archive"
    with pytest.raises(UserError, match=r"not the file that was published \(15 bytes"):
        download(f"{server.url}/a", tmp_path / "a", 15, "0" * 64)
    assert not list(tmp_path.iterdir())  # it never had the name of a good one
    with pytest.raises(UserError, match="Not Found; the same command goes on .* another --source"):
        download(f"{server.url}/b", tmp_path / "b", 15, "0" * 64)
    with pytest.raises(UserError, match="Connection refused"):
        download("http://127.0.0.1:9/c", tmp_path / "c")


def test_archives_become_the_published_layout(server, tmp_path, monkeypatch):
    """Every archive, one of them with ./ before its names as FLORES-200's has; whatever is there is
    not fetched again."""
    published = write_corpora(tmp_path / "published")
    known = {}
    for pair in PAIRS:
        server.files[f"/{pair}.tar.gz"] = archive(published, f"{corpora.OPUS}/{pair}")
        known[pair] = (
            len(server.files[f"/{pair}.tar.gz"]),
            hashlib.sha256(server.files[f"/{pair}.tar.gz"]).hexdigest(),
        )
    server.files["/flores200_dataset.tar.gz"] = archive(published, corpora.FLORES, "./")
    monkeypatch.setattr(corpora, "OPUS_URL", server.url + "/{pair}.tar.gz")
    monkeypatch.setattr(corpora, "FLORES_URL", server.url + "/flores200_dataset.tar.gz")
    monkeypatch.setattr(corpora, "ARCHIVES", known)
    fetch(tmp_path / "got", PAIRS, CODES, "publisher")
    assert texts(tmp_path / "got") == texts(published)
    sources = json.loads((tmp_path / "got/sources.json").read_text())
    (entry,) = sources["de-en"]
    assert entry == {
        "source": f"{server.url}/de-en.tar.gz",
        "sha256": known["de-en"][1],
        "files": entry["files"],
    }
    assert len(entry["files"]) == 6
    assert set(sources) == {*PAIRS, "flores-200"}
    count = len(server.asked)
    with lock_folder(tmp_path / "got"):  # what is whole is not written to, and may be read-only
        fetch(tmp_path / "got", PAIRS, CODES, "publisher")
    assert len(server.asked) == count
    mine, lost = (corpora.flores_file(tmp_path / "got", code, "dev") for code in CODES[:2])
    mine.write_text("my own\n")
    lost.unlink()
    fetch(tmp_path / "got", PAIRS, CODES, "publisher")
    assert (
        mine.read_text() == "my own\n"
        and lost.read_bytes() == texts(published)[str(lost.relative_to(tmp_path / "got"))]
    )
    # where the other files are from is still known
    entries = json.loads((tmp_path / "got/sources.json").read_text())["flores-200"]
    assert [len(entry["files"]) for entry in entries] == [2 * len(CODES), 1]
    (tmp_path / "got/de-en.tar.gz").write_bytes(server.files["/de-en.tar.gz"][:300])
    corpora.opus_files(tmp_path / "got", "de-en", "dev")[0].unlink()
    with pytest.raises(UserError, match="not the file that was published"):
        fetch(tmp_path / "got", PAIRS, CODES, "publisher")
    lock = lock_folder(tmp_path / "got")
    with pytest.raises(UserError, match="another process is at work"):
        fetch(tmp_path / "got", PAIRS, CODES, "publisher")
    lock.close()
    with pytest.raises(UserError, match="can't be unpacked"):
        corpora.extract(tmp_path / "got/de-en.tar.gz", {"x": tmp_path / "x"})
    with pytest.raises(UserError, match="no fr.* in it"):
        corpora.extract(tmp_path / "got/cs-en.tar.gz", {"fr": tmp_path / "x"})


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The synthetic corpora as the hub publishes them: parquet splits, FLORES+ half parquet and
    half JSON lines."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    published = write_corpora(tmp_path / "published")

    def parquet(rows):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()

    at = f"/datasets/{corpora.OPUS_HUB}/resolve/{COMMIT}"
    for pair in PAIRS:
        for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
            files = corpora.opus_files(published, pair, split)
            columns = [file.read_text().split("\n")[:-1] for file in files]
            rows = [{"translation": dict(zip(pair.split("-"), texts))} for texts in zip(*columns)]
            half = len(rows) // 2  # two shards, in order
            for i, part in enumerate((rows[:half], rows[half:])):
                server.files[f"{at}/{pair}/{name}-0000{i}-of-00002.parquet"] = parquet(part)
    at = f"/datasets/{corpora.FLORES_HUB}/resolve/{COMMIT}"
    for code in CODES:
        for split in ("dev", "devtest"):
            lines = corpora.flores_file(published, code, split).read_text().split("\n")[:-1]
            rows = [{"id": i, "text": text} for i, text in enumerate(lines)][::-1]
            file = f"{at}/{split}/{corpora.FLORES_PLUS.get(code, code)}"
            if code < "eng":
                server.files[file + ".parquet"] = parquet(rows)
            else:
                json_lines = "".join(json.dumps(row) + "\n" for row in rows)
                server.files[file + ".jsonl"] = json_lines.encode()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return published


def command(*flags):
    return (ROOT / "data.py", "--train-pairs", 20, *flags)


def test_the_hub_gives_the_same_corpora_and_the_same_bytes(hub, server, tmp_path):
    run(*command("--data", hub, "--out", tmp_path / "a"))
    run(*command("--data", tmp_path / "got", "--source", "hub", "--out", tmp_path / "b"))
    assert texts(tmp_path / "got") == texts(hub)
    manifests = [json.loads((tmp_path / x / "manifest.json").read_text()) for x in "ab"]
    assert (
        manifests[0]["files"] == manifests[1]["files"]
        and manifests[0]["inputs"] == manifests[1]["inputs"]
    )
    (entry,) = manifests[1]["sources"]["de-en"]
    assert (entry["source"], entry["revision"]) == (
        f"hub: {corpora.OPUS_HUB}",
        COMMIT,
    ) and manifests[1]["settings"]["seed"] == 0
    for name, entry in manifests[0]["files"].items():
        assert (
            file_sha256(tmp_path / "a" / name)
            == entry["sha256"]
            == file_sha256(tmp_path / "b" / name)
        )
        assert len(read_rows(tmp_path / "a" / name)) == entry["pairs"]
    count = len(server.asked)
    done = run(
        *command("--data", tmp_path / "got2", "--source", "hub", "--out", tmp_path / "c"),
        env_add={"HF_HUB_OFFLINE": "1"},
    )
    # the hub's cache is enough
    assert "prepared already" not in done.stdout and len(server.asked) == count


def test_gated_missing_and_offline_are_one_line(hub, server, tmp_path):
    """In a subprocess: huggingface_hub reads its environment when it is imported."""
    server.files.clear()
    done = run(
        *command("--data", tmp_path / "x", "--source", "hub", "--out", tmp_path / "y"), check=False
    )
    assert (
        done.returncode == 2
        and "check the name" in done.stderr
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    train = (ROOT / "train.py", "--stage", 1, "--dry-run", "--model")
    done = run(*train, "meta/gated-model", check=False)
    assert (
        done.returncode == 2
        and "accept its licence at https://huggingface.co/meta/gated-model, then `hf auth login`"
        in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr
    done = run(*train, "some/model", check=False, env_add={"HF_HUB_OFFLINE": "1"})
    assert (
        done.returncode == 2
        and "HF_HUB_OFFLINE" in done.stderr
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    assert not (tmp_path / "y").exists()


def test_a_model_from_the_hub_is_cached_pinned_and_used_offline(
    server, checkpoint, tmp_path, monkeypatch
):
    for file in checkpoint.iterdir():
        server.files[f"/some/model/resolve/{COMMIT}/{file.name}"] = file.read_bytes()
    for extra in ("pytorch_model.bin", "original/consolidated.00.pth", "README.md"):
        server.files[f"/some/model/resolve/{COMMIT}/{extra}"] = b"not needed"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def resolve(name, **kwargs):
        code = f"from support import runs; print(*runs.resolve({name!r}))"
        return run("-c", code, **kwargs).stdout.split()

    folder, pinned = resolve("some/model")
    assert pinned == f"some/model@{COMMIT}"
    assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == {
        p.name: p.read_bytes() for p in checkpoint.iterdir()
    }
    count = len(server.asked)
    for name in ("some/model", pinned):
        assert resolve(name, env_add={"HF_HUB_OFFLINE": "1"}) == [folder, pinned]
    assert len(server.asked) == count


def test_without_a_network_the_command_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "OPUS_URL", "http://127.0.0.1:9/{pair}.tar.gz")
    with pytest.raises(UserError, match="put it at .*en-is.tar.gz, or try another --source"):
        fetch(tmp_path, ["en-is"], [], "publisher")
    refuses(
        ROOT / "data.py",
        "--data",
        tmp_path / "empty",
        "--out",
        tmp_path / "o",
        says=["no such file", "--source publisher or hub"],
    )


def test_noise_is_counted_and_dropped_by_rule():
    pairs = [
        ("", "x"),
        ("a", "b"),
        ("a", "b"),
        ("OK", "OK"),
        ("Yes.", "Ja, das ist in der Tat so."),
        ("held", "c"),
        ("d", "gehalten"),
        ("e", "f"),
    ]
    kept, count = clean(
        pairs, {"held"}, {"gehalten"}, ("duplicate", "identical", "length_ratio"), 5
    )
    assert kept == [("a", "b"), ("e", "f")]
    assert count == {
        "read": 8,
        "empty": 1,
        "in_dev_or_test": 2,
        "duplicate": 1,
        "identical": 1,
        "length_ratio": 1,
    }
    kept, again = clean(pairs, {"held"}, {"gehalten"}, (), 5)
    assert kept == [pairs[i] for i in (1, 2, 3, 4, 7)] and again == count
    assert clean(pairs, set(), set(), ("identical",), 5)[0] == [
        pairs[i] for i in (1, 2, 4, 5, 6, 7)
    ]
    # repeated ones too
    assert (
        clean(pairs * 2, set(), set(), ("identical",), 5)[0]
        == [pairs[i] for i in (1, 2, 4, 5, 6, 7)] * 2
    )


def test_the_counts_of_table_5(tmp_path):
    """Corpora of the real ones' dev, test and FLORES-200 sizes, and a training set with more than
    20,000 clean pairs."""
    languages = list(LANGUAGES)
    root = write_corpora(tmp_path, train=20_600, dev=2000, test=2000, flores=(997, 1012))
    files, _ = prepare(root, languages, sizes())
    by = {name: directions(rows) for name, rows in files.items()}
    english = [d for d in all_directions(languages) if "en" in d]
    others = [d for d in all_directions(languages) if "en" not in d]
    assert by["stage1.train"] == dict.fromkeys(english, 20_997)
    assert by["stage1.dev"] == dict.fromkeys(english, 2000)
    assert by["test"] == {**dict.fromkeys(english, 2000), **dict.fromkeys(others, 1012)}
    assert by["stage2.flores"] == dict.fromkeys(others, 997) and sum(by["test"].values()) == 40_240
    capped, _ = prepare(write_corpora(tmp_path / "small"), languages, sizes(20, pivot=30))
    assert set(directions(capped["pivot.source"]).values()) == {30}
