//! What the user names as input: image files, folders, webdataset tars, brace ranges, `-` for paths on standard input.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// One input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// An image file.
    Image(PathBuf),
    /// A folder, searched recursively.
    Folder(PathBuf),
    /// A webdataset tar, gzip-compressed or not.
    Tar(PathBuf),
    /// Image paths on standard input, one a line.
    StandardInput,
}

/// Extensions of the files that a folder or tar is searched for.
const IMAGE_EXTENSIONS: [&str; 6] = ["jpg", "jpeg", "png", "webp", "gif", "bmp"];

/// Whether `extension` (without the dot) names an image format that the load stage reads.
#[must_use]
pub fn is_image_extension(extension: &str) -> bool {
    IMAGE_EXTENSIONS.iter().any(|known| known.eq_ignore_ascii_case(extension))
}

impl Input {
    /// Expands brace ranges in `text` and tells each input's kind by what is on disk.
    ///
    /// # Errors
    /// [`Error::Input`] when something does not exist or is of no kind that is read.
    pub fn parse(text: &str) -> Result<Vec<Self>> {
        if text == "-" {
            return Ok(vec![Self::StandardInput]);
        }
        if Path::new(text).exists() {
            return Ok(vec![Self::from_path(Path::new(text))?]);
        }
        let expanded = expand_braces(text).map_err(|reason| Error::Input {
            input: text.to_owned(),
            reason,
            hint: "a brace range is two numbers of one width, such as {00000..00012}",
        })?;
        expanded.iter().map(|path| Self::from_path(Path::new(path))).collect()
    }

    fn from_path(path: &Path) -> Result<Self> {
        let refuse = |reason: &str, hint| {
            Err(Error::Input { input: path.display().to_string(), reason: reason.to_owned(), hint })
        };
        let Ok(metadata) = std::fs::metadata(path) else {
            return refuse("no such file or folder", "check the path; a range looks like {00000..00012}");
        };
        if metadata.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        if [".tar", ".tar.gz", ".tgz"].iter().any(|suffix| name.ends_with(suffix)) {
            return Ok(Self::Tar(path.to_owned()));
        }
        if name.rsplit_once('.').is_some_and(|(_, extension)| is_image_extension(extension)) {
            return Ok(Self::Image(path.to_owned()));
        }
        refuse(
            "not an image, a folder or a tar, by its name",
            "images end in .jpg, .jpeg, .png, .webp, .gif or .bmp, webdataset shards in .tar, .tar.gz or .tgz",
        )
    }
}

/// `shards/{00000..00012}.tar` to its 13 paths; several ranges multiply; text without one stays as it is.
pub(crate) fn expand_braces(text: &str) -> Result<Vec<String>, String> {
    const MAX_PATHS: u64 = 10_000_000;
    let Some((before, rest)) = text.split_once('{') else { return Ok(vec![text.to_owned()]) };
    let (range, after) = rest.split_once('}').ok_or("a `{` has no `}`")?;
    let (first, last) = range.split_once("..").ok_or_else(|| format!("`{{{range}}}` is not a range"))?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("`{text}` is not a number"));
    let (from, to) = (number(first)?, number(last)?);
    if from > to {
        return Err(format!("`{{{range}}}` runs backwards"));
    }
    if to - from >= MAX_PATHS {
        return Err(format!("`{{{range}}}` has more than {MAX_PATHS} paths"));
    }
    let tails = expand_braces(after)?;
    let width = first.len();
    Ok((from..=to).flat_map(|i| tails.iter().map(move |tail| format!("{before}{i:0width$}{tail}"))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brace_ranges_keep_their_width_and_multiply() {
        assert_eq!(
            expand_braces("a/{008..010}.tar"),
            Ok(vec!["a/008.tar".into(), "a/009.tar".into(), "a/010.tar".into()])
        );
        assert_eq!(expand_braces("{0..1}{8..9}").map(|paths| paths.join(" ")), Ok("08 09 18 19".to_owned()));
        assert_eq!(expand_braces("plain.jpg"), Ok(vec!["plain.jpg".into()]));
        for bad in ["a{1..", "a{1}", "a{2..1}", "a{x..y}", "a{0..99999999999}"] {
            assert!(expand_braces(bad).is_err(), "{bad}");
        }
    }
}
