#!/bin/sh
# Fetch the Noto Color Emoji font (SIL OFL 1.1) from the Debian archive into a scratch folder.
# Usage: fetch_font.sh SCRATCH_DIR     (prints the path of the font file)
set -eu
out=${1:?usage: fetch_font.sh SCRATCH_DIR}
mkdir -p "$out"
cd "$out"
if ! find . -name NotoColorEmoji.ttf | grep -q .; then
    apt-get download fonts-noto-color-emoji >&2
    dpkg-deb -x fonts-noto-color-emoji_*.deb font
fi
find "$PWD" -name NotoColorEmoji.ttf | head -n 1
