//! What the user names as input: image files, folders, webdataset tars, Parquet files, on this machine or in an object store,
//! brace ranges of them, `-` for paths and URLs on standard input.

use std::path::Path;

use crate::error::{Error, Result};
use crate::storage::{Failure, Location};

/// One input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// An image file.
    Image(Location),
    /// A folder, searched recursively, or a prefix of objects.
    Folder(Location),
    /// A webdataset tar, gzip-compressed or not.
    Tar(Location),
    /// A Parquet file with a column of images.
    Parquet(Location),
    /// Paths and URLs of images on standard input, one a line.
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
    /// Expands brace ranges in `text` and tells each input's kind: of a path by what is on disk, of a URL by its name. Of the
    /// URLs of a range the first is looked at, so that wrong credentials are told before a model is loaded.
    ///
    /// # Errors
    /// [`Error::Input`] when something does not exist or is of no kind that is read, [`Error::Storage`] when an object store
    /// refuses.
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
        let inputs = expanded.iter().map(|text| match Location::parse(text)? {
            Location::Local(path) => Self::from_path(&path),
            location => Self::from_url(location, text.ends_with('/')),
        });
        let inputs: Vec<Self> = inputs.collect::<Result<_>>()?;
        if let Some(first) = inputs.first() {
            first.look()?;
        }
        Ok(inputs)
    }

    fn from_path(path: &Path) -> Result<Self> {
        let refuse = |reason: &str, hint| {
            Err(Error::Input { input: path.display().to_string(), reason: reason.to_owned(), hint })
        };
        let Ok(metadata) = std::fs::metadata(path) else {
            let hint = match path.to_string_lossy().contains(['*', '?']) {
                true => "patterns are the shell's: leave the quotes out, or write a range such as {00000..00012}",
                false => "check the path; a range looks like {00000..00012}",
            };
            return refuse("no such file or folder", hint);
        };
        let location = Location::from(path);
        if metadata.is_dir() {
            return Ok(Self::Folder(location));
        }
        match Self::by_name(location) {
            Ok(input) => Ok(input),
            Err(_) => refuse(
                "not an image, a folder, a tar or a parquet file, by its name",
                "images end in .jpg, .jpeg, .png, .webp, .gif or .bmp, webdataset shards in .tar, .tar.gz or .tgz, Parquet files in \
                 .parquet; a list of paths goes to standard input: recaption run - < LIST",
            ),
        }
    }

    fn from_url(location: Location, is_folder: bool) -> Result<Self> {
        let location = if is_folder { Err(location) } else { Self::by_name(location) };
        match location {
            Ok(input) => Ok(input),
            Err(location) if location.is_listable() => Ok(Self::Folder(location)),
            // Addresses of images often say nothing of their format.
            Err(location) if !is_folder && !location.file_name().is_empty() => Ok(Self::Image(location)),
            Err(location) => Err(Error::Input {
                input: location.to_string(),
                reason: "web servers cannot be listed".to_owned(),
                hint: "give the addresses of its files, on standard input if they are many",
            }),
        }
    }

    /// The kind that the name tells, or the location back.
    pub(crate) fn by_name(location: Location) -> Result<Self, Location> {
        let name = location.file_name().to_ascii_lowercase();
        if [".tar", ".tar.gz", ".tgz"].iter().any(|suffix| name.ends_with(suffix)) {
            return Ok(Self::Tar(location));
        }
        match name.rsplit_once('.') {
            Some((_, "parquet")) => Ok(Self::Parquet(location)),
            Some((_, extension)) if is_image_extension(extension) => Ok(Self::Image(location)),
            _ => Err(location),
        }
    }

    /// Asks an object store whether the input is there.
    fn look(&self) -> Result<()> {
        let refuse = |location: &Location, hint| {
            Err(Error::Input { input: location.to_string(), reason: "no such object".to_owned(), hint })
        };
        match self {
            Self::Folder(Location::Object(prefix)) => match prefix.list()?.next() {
                Some(found) => found.map(|_| ()),
                None => refuse(&Location::Object(prefix.clone()), "nothing lies below this prefix"),
            },
            Self::Image(location @ Location::Object(_))
            | Self::Tar(location @ Location::Object(_))
            | Self::Parquet(location @ Location::Object(_)) => {
                match location.exists() {
                    Ok(true) => Ok(()),
                    Ok(false) => refuse(location, "check the URL; a range looks like {00000..00012}"),
                    // Not every web server answers this question: the reading will tell.
                    Err(Error::Storage {
                        failure: Failure::Other | Failure::Unsupported | Failure::Server, ..
                    }) if !location.is_listable() => Ok(()),
                    Err(error) => Err(error),
                }
            }
            _ => Ok(()),
        }
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
