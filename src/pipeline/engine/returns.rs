//! Images that failed engines give back, for those that are left. Nothing is locked on the way of an image that no engine
//! fails with.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::pipeline::preprocess::PreprocessedImage;

/// One engine's end of the queue of returned images. It holds a sender as long as it may have images to return, and each
/// image on its way holds one: when all are gone, no image can come any more.
pub(crate) struct Returns {
    receiver: Receiver<Returned>,
    sender: Option<Sender<Returned>>,
    num_engines: Arc<AtomicUsize>,
}

/// An image on its way back.
pub(crate) struct Returned {
    image: PreprocessedImage,
    sender: Sender<Returned>,
}

impl Returns {
    /// An end for each of `count` engines.
    pub(crate) fn for_engines(count: usize) -> Vec<Self> {
        let (sender, receiver) = unbounded();
        let num_engines = Arc::new(AtomicUsize::new(count));
        let end =
            || Self { receiver: receiver.clone(), sender: Some(sender.clone()), num_engines: Arc::clone(&num_engines) };
        (0..count).map(|_| end()).collect()
    }

    pub(crate) fn receiver(&self) -> &Receiver<Returned> {
        &self.receiver
    }

    /// Takes on an image that another engine returned.
    pub(crate) fn accept(&mut self, Returned { image, sender }: Returned) -> PreprocessedImage {
        self.sender = Some(sender);
        image
    }

    /// An image, if one is there.
    pub(crate) fn take(&mut self) -> Option<PreprocessedImage> {
        let returned = self.receiver.try_recv().ok()?;
        Some(self.accept(returned))
    }

    /// The caller has no image itself, and gets none but from here: when nobody else has any, [`Self::receiver`] is disconnected.
    pub(crate) fn hold_none(&mut self) {
        self.sender = None;
    }

    /// Counts this engine out, as it fails; says whether others are left.
    pub(crate) fn leave(&self) -> bool {
        self.num_engines.fetch_sub(1, Ordering::AcqRel) > 1
    }

    /// Gives an image to the others.
    pub(crate) fn give(&self, image: PreprocessedImage) {
        let sender = self.sender.as_ref().expect("bug: an engine with an image holds a sender");
        // The channel is open: this end holds a receiver.
        let _ = sender.send(Returned { image, sender: sender.clone() });
    }
}
