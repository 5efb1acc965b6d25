//! A folder, searched recursively: entries in lexicographic order, one directory in memory at a time. Links to folders
//! are not followed, so that a loop cannot hold the run.

use std::fs::DirEntry;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pipeline::input::is_image_extension;
use crate::pipeline::source::emitter::Emitter;
use crate::pipeline::source::{FileShards, stem};

/// Sends every image below `folder`; keys are paths below it. Returns what is wrong with the folder, if anything is.
pub(super) fn run(folder: &Path, emitter: &mut Emitter<'_>) -> Result<Option<Error>> {
    let mut shards = FileShards::new(stem(folder));
    let mut num_images = 0;
    let mut damage = None;
    let mut walk = Walk::default();
    let mut next = walk.enter(folder).and_then(|()| walk.next_image());
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
        num_images += 1;
        let key = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        shards.push(emitter, &path, key)?;
        if emitter.is_done() {
            break;
        }
        next = walk.next_image();
    }
    shards.end(emitter)?;
    if num_images == 0 && !emitter.is_done() {
        damage.get_or_insert(Error::Input {
            input: folder.display().to_string(),
            reason: "no image in it".to_owned(),
            hint: "images end in .jpg, .jpeg, .png, .webp, .gif or .bmp",
        });
    }
    Ok(damage)
}

/// Images below `folder`; `None` when it cannot be read.
pub(super) fn count_images(folder: &Path) -> Option<u64> {
    let mut walk = Walk::default();
    walk.enter(folder).ok()?;
    let mut count = 0;
    while walk.next_image().ok()?.is_some() {
        count += 1;
    }
    Some(count)
}

/// Depth-first walk; the stack holds the rest of each directory on the way down.
#[derive(Default)]
struct Walk {
    stack: Vec<std::vec::IntoIter<DirEntry>>,
}

impl Walk {
    fn enter(&mut self, folder: &Path) -> Result<()> {
        self.stack.push(sorted_entries(folder)?);
        Ok(())
    }

    fn next_image(&mut self) -> Result<Option<PathBuf>> {
        while let Some(entries) = self.stack.last_mut() {
            let Some(entry) = entries.next() else {
                self.stack.pop();
                continue;
            };
            let path = entry.path();
            let kind = entry.file_type().map_err(Error::io("read", &path))?;
            if kind.is_dir() {
                self.enter(&path)?;
            } else if path.extension().is_some_and(|extension| is_image_extension(&extension.to_string_lossy()))
                && (kind.is_file() || path.is_file())
            {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

fn sorted_entries(folder: &Path) -> Result<std::vec::IntoIter<DirEntry>> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut entries = entries.map_err(Error::io("read", folder))?;
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries.into_iter())
}
