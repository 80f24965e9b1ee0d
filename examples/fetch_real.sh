#!/usr/bin/env bash
# Real recordings to test a model with, from Debian packages; none of them is for training.
#
#     examples/fetch_real.sh OUT [FOLDER WITH THE .deb FILES]
#
# OUT/prompts.jsonl   short texts of one woman (asterisk-core-sounds-en, CC-BY-SA-3.0), 16 kHz
# OUT/digits.jsonl    zero to nine alone, of the same
# OUT/books.jsonl     sentences of readers of LibriVox (pocketsphinx-testdata, BSD-like), 16 kHz
#
# Lines are {"audio", "text"}. Needs Debian or Ubuntu (apt-get, dpkg-deb), python3 and ffmpeg, or the
# path of one in FFMPEG (`pip install imageio-ffmpeg` brings one).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
packages=(asterisk-core-sounds-en-g722 asterisk-core-sounds-en pocketsphinx-testdata)
export FFMPEG=${FFMPEG:-ffmpeg}
for tool in dpkg-deb "$FFMPEG" python3; do
    command -v "$tool" >/dev/null || { echo "$tool is not installed" >&2; exit 1; }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ $# -ge 2 ]; then
    for package in "${packages[@]}"; do cp "$2/${package}"_*.deb "$work"; done
else
    (cd "$work" && apt-get download "${packages[@]}")
fi
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/root"; done

python3 - "$work/root" "$out" <<'PYTHON'
import gzip, json, os, re, subprocess, sys
from pathlib import Path

root, out = map(Path, sys.argv[1:])
DIGITS = "zero one two three four five six seven eight nine".split()


def only(pattern):
    found = sorted(root.rglob(pattern))
    if not found:
        sys.exit(f"the packages hold no {pattern}: expected those of Debian 12 or 13")
    return found[0]


def convert(source, target, *how):
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [os.environ["FFMPEG"], "-nostdin", "-v", "error", "-y", *how, "-i", source, "-ar", "16000"]
    subprocess.run([*map(str, command), "-ac", "1", str(target)], check=True)


def write(name, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / name).write_text(lines, encoding="utf-8")
    print(f"{out / name}: {len(rows)} recordings")


texts = {}
with gzip.open(only("core-sounds-en.txt.gz"), "rt", encoding="utf-8") as lines:
    for line in lines:
        key, colon, text = line.strip().partition(":")
        # A text in brackets says what a sound is: "[ring tone]".
        if colon and not key.startswith(";") and text.strip() and "[" not in text:
            texts[key.strip()] = text.strip()
sounds = only("digits/1.g722").parents[1]
prompts, digits = [], []
for key, text in sorted(texts.items()):
    source = sounds / f"{key}.g722"
    if not source.is_file():
        continue
    name = f"prompts/{key}.wav"
    convert(source, out / name, "-f", "g722")
    prompts.append({"audio": name, "text": text})
    if re.fullmatch(r"digits/\d", key):
        digits.append({"audio": name, "text": DIGITS[int(key[-1])]})
write("prompts.jsonl", prompts)
write("digits.jsonl", digits)

books = []
for list_ in sorted(root.rglob("*transcription")):
    for line in list_.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)", line)
        for source in sorted(list_.parent.rglob(f"{match[2]}.wav")) if match else []:
            name = f"books/{source.name}"
            convert(source, out / name)
            books.append({"audio": name, "text": match[1].lower()})
write("books.jsonl", books)
PYTHON
