//! A folder, searched recursively, or the objects below a prefix: images in lexicographic order of their keys. One directory,
//! or one page of a listing, is in memory at a time. Links to folders are not followed, so that a loop cannot hold the run.

use std::ffi::OsString;
use std::fs::DirEntry;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pipeline::input::{Input, is_image_extension};
use crate::pipeline::source::emitter::Emitter;
use crate::pipeline::source::{FileShards, stem};
use crate::storage::{Location, Object};

/// Sends every image below `folder`; keys are paths below it. Returns what is wrong with the folder, if anything is.
///
/// # Errors
/// [`Error::Storage`] when an object store gives no answer, and what the emitter cannot do.
pub(super) fn run(folder: &Location, emitter: &mut Emitter<'_>) -> Result<Option<Error>> {
    let mut shards = FileShards::new(stem(folder));
    let (is_empty, mut damage) = match folder {
        Location::Local(path) => send_folder(path, &mut shards, emitter)?,
        Location::Object(prefix) => (send_prefix(prefix, &mut shards, emitter)?, None),
    };
    shards.end(emitter)?;
    if is_empty && !emitter.is_done() {
        damage.get_or_insert(no_image(folder));
    }
    Ok(damage)
}

pub(super) fn no_image(folder: &Location) -> Error {
    let (reason, hint) = match folder.local_path().is_some_and(has_shards) {
        true => (
            "no image in it, but shards",
            "name the shards: FOLDER/*.tar, FOLDER/*.parquet, or a range such as 'FOLDER/{00000..00099}.tar'",
        ),
        false => ("no image in it", "images end in .jpg, .jpeg, .png, .webp, .gif or .bmp"),
    };
    Error::Input { input: folder.to_string(), reason: reason.to_owned(), hint }
}

/// Whether there are tars or Parquet files right in `folder`.
fn has_shards(folder: &Path) -> bool {
    let is_shard = |path: PathBuf| matches!(Input::by_name(path.into()), Ok(Input::Tar(_) | Input::Parquet(_)));
    std::fs::read_dir(folder).is_ok_and(|entries| entries.flatten().any(|entry| is_shard(entry.path())))
}

/// Whether there is no image below `folder`, on this machine, all of which can be read. Looks no further than the first image.
pub(super) fn is_empty(folder: &Path) -> bool {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(folder) else { return false };
        for entry in entries {
            match entry.and_then(|entry| Ok((kind(&entry)?, entry.path()))) {
                Ok((Some(Kind::Folder), path)) => folders.push(path),
                Ok((None, _)) => {}
                Ok((Some(Kind::Image), _)) | Err(_) => return false,
            }
        }
    }
    true
}

/// Returns whether there was no image, and the first directory's error.
fn send_folder(folder: &Path, shards: &mut FileShards, emitter: &mut Emitter<'_>) -> Result<(bool, Option<Error>)> {
    let (mut is_empty, mut damage) = (true, None);
    let mut walk = Walk::default();
    let mut next = walk.enter(folder.to_owned()).and_then(|()| walk.next_image());
    loop {
        let path = match next {
            Ok(Some(path)) => path,
            Ok(None) => break,
            // A directory that cannot be read: its images are not rows, the others are.
            Err(error) => {
                damage.get_or_insert(error);
                next = walk.next_image();
                continue;
            }
        };
        is_empty = false;
        let key = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        shards.push(emitter, Location::Local(path), key)?;
        if emitter.is_done() {
            break;
        }
        next = walk.next_image();
    }
    Ok((is_empty, damage))
}

/// Returns whether there was no image. Half a listing is no input: its error ends the run.
fn send_prefix(prefix: &Object, shards: &mut FileShards, emitter: &mut Emitter<'_>) -> Result<bool> {
    let mut is_empty = true;
    for found in prefix.list()? {
        let found = found?;
        if found.key.rsplit_once('.').is_some_and(|(_, extension)| is_image_extension(extension)) {
            is_empty = false;
            shards.push(emitter, found.location, found.key)?;
        }
        if emitter.is_done() {
            break;
        }
    }
    Ok(is_empty)
}

/// Images below `folder`; `None` when it cannot be read or is far away.
pub(super) fn count_images(folder: &Location) -> Option<u64> {
    let mut walk = Walk::default();
    walk.enter(folder.local_path()?.to_owned()).ok()?;
    let mut count = 0;
    while walk.next_image().ok()?.is_some() {
        count += 1;
    }
    Some(count)
}

/// Depth-first walk; the stack holds the rest of each directory on the way down, names of images and folders alone.
#[derive(Default)]
struct Walk {
    stack: Vec<(PathBuf, std::vec::IntoIter<Entry>)>,
}

struct Entry {
    name: OsString,
    kind: Kind,
}

/// What an entry of a directory is, of the kinds that matter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Folder,
    Image,
}

/// Links to folders and all other files are none.
fn kind(entry: &DirEntry) -> io::Result<Option<Kind>> {
    let kind = entry.file_type()?;
    if kind.is_dir() {
        return Ok(Some(Kind::Folder));
    }
    let has_name =
        Path::new(&entry.file_name()).extension().is_some_and(|end| is_image_extension(&end.to_string_lossy()));
    let is_file = || kind.is_file() || (kind.is_symlink() && entry.path().is_file());
    Ok((has_name && is_file()).then_some(Kind::Image))
}

impl Walk {
    fn enter(&mut self, folder: PathBuf) -> Result<()> {
        let entries = sorted_entries(&folder)?;
        self.stack.push((folder, entries));
        Ok(())
    }

    fn next_image(&mut self) -> Result<Option<PathBuf>> {
        while let Some((folder, entries)) = self.stack.last_mut() {
            let Some(entry) = entries.next() else {
                self.stack.pop();
                continue;
            };
            let path = folder.join(&entry.name);
            if entry.kind == Kind::Folder {
                self.enter(path)?;
            } else {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

/// Folders compare as if a slash stood behind them: the keys of the whole walk come in order then, and in that of the same
/// files in an object store.
fn sorted_entries(folder: &Path) -> Result<std::vec::IntoIter<Entry>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if let Some(kind) = kind(&entry).map_err(Error::io("read", folder))? {
            entries.push(Entry { name: entry.file_name(), kind });
        }
    }
    entries.sort_unstable_by(|a, b| order(a).cmp(order(b)));
    Ok(entries.into_iter())
}

fn order(entry: &Entry) -> impl Iterator<Item = u8> {
    entry.name.as_encoded_bytes().iter().copied().chain((entry.kind == Kind::Folder).then_some(b'/'))
}
