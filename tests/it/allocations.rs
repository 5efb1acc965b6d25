//! Loading and preprocessing reuse their memory: once warm, no picture allocates anything large.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use recaption::pipeline::load::{LoadLimits, Loader};
use recaption::pipeline::preprocess::Preprocessor;

use crate::preprocessing::settings;
use crate::support::{fetched, read_json};

/// Largest allocation of a warm picture: segments and tables of the file, not pixels.
const MAX_BYTES: usize = 4096;

struct Counting;

thread_local! {
    /// Allocations of this thread and the largest of them, in bytes.
    static ALLOCATED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn note(size: usize) {
    // While a thread ends its counter may be gone; nothing is measured then.
    let _ = ALLOCATED.try_with(|counter| {
        let (number, largest) = counter.get();
        counter.set((number + 1, largest.max(size)));
    });
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_warm_loader_allocates_no_pixels() {
    let folder = fetched("photos");
    let index = read_json(&folder.join("index.json"));
    // Upright plain JPEGs, whole and reduced: what the web consists of. (Of progressive ones the coefficients are held.)
    let is_wanted =
        |name: &str| name.ends_with(".jpg") && !["turned", "mirrored"].iter().any(|kind| name.contains(kind));
    let names = index["photos"].as_array().unwrap().iter().map(|photo| photo["file"].as_str().unwrap());
    let mut files: Vec<_> =
        names.filter(|name| is_wanted(name)).map(|name| std::fs::read(folder.join(name)).unwrap()).collect();
    files.retain(|bytes| !bytes.windows(2).any(|marker| marker == b"\xff\xc2"));
    assert!(files.len() >= 10, "{} files", files.len());
    let settings = settings(true);
    let mut loader = Loader::new(LoadLimits::default(), Some(settings.clone()));
    let mut preprocessor = Preprocessor::new(settings);
    let mut values = vec![0.0; preprocessor.num_values()];
    let mut memory = Vec::new();
    for round in 0..2 {
        ALLOCATED.set((0, 0));
        for bytes in &files {
            let image = loader.load(bytes, std::mem::take(&mut memory)).unwrap();
            preprocessor.run(&image, &mut values).unwrap();
            memory = image.pixels;
        }
        let (number, largest) = ALLOCATED.get();
        println!(
            "round {round}: {:.1} allocations a picture, at most {largest} bytes",
            number as f64 / files.len() as f64
        );
        if round == 1 {
            assert!(largest <= MAX_BYTES, "{largest} bytes at once");
        }
    }
}
