//! A captioner that fails when told to, to test that nothing is lost when a device does.

use std::str::FromStr;

use crate::error::{Error, Result};
use crate::model::Sequence;
use crate::pipeline::engine::Captioner;
use crate::pipeline::preprocess::PreprocessedImage;
use crate::stage::Stage;

/// Which engine fails, and when: `1:20` is engine 1 at its decode step 20, `0:3:start` engine 0 at its batch 3,
/// `0:3:panic` engine 0 with a panic at its decode step 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    pub(crate) engine: usize,
    at: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Start,
    Decode,
    Panic,
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(':');
        let mut number = || parts.next().and_then(|part| part.parse().ok());
        let (Some(engine), Some(at)) = (number(), number()) else {
            return Err(format!("expected ENGINE:STEP, got `{text}`"));
        };
        let kind = match parts.next() {
            None | Some("decode") => Kind::Decode,
            Some("start") => Kind::Start,
            Some("panic") => Kind::Panic,
            Some(other) => return Err(format!("expected start, decode or panic, got `{other}`")),
        };
        Ok(Self { engine, at, kind })
    }
}

/// A captioner behind which a device fails: from the step on that `injection` names, every call does.
pub(crate) struct Failing {
    inner: Box<dyn Captioner>,
    injection: Injection,
    num_starts: usize,
    num_steps: usize,
}

impl Failing {
    pub(crate) fn new(inner: Box<dyn Captioner>, injection: Injection) -> Self {
        Self { inner, injection, num_starts: 0, num_steps: 0 }
    }

    fn check(&self, kind: Kind, count: usize, stage: Stage) -> Result<()> {
        if self.injection.kind != kind || count < self.injection.at {
            return Ok(());
        }
        let source = Error::Cuda { doing: "wait for the GPU", status: 719, reason: "injected failure".to_owned() };
        Err(Error::Stage { stage, source: Box::new(source) })
    }
}

impl Captioner for Failing {
    fn num_free_slots(&self) -> usize {
        self.inner.num_free_slots()
    }

    fn max_batch(&self) -> usize {
        self.inner.max_batch()
    }

    fn num_active(&self) -> usize {
        self.inner.num_active()
    }

    fn start(&mut self, images: Vec<PreprocessedImage>, enter: &dyn Fn(Stage)) -> Result<()> {
        // As a device does it: the images are in its hands already.
        self.inner.start(images, enter)?;
        self.num_starts += 1;
        self.check(Kind::Start, self.num_starts - 1, Stage::Vision)
    }

    fn decode(&mut self) -> Result<()> {
        self.num_steps += 1;
        self.check(Kind::Decode, self.num_steps - 1, Stage::Decode)?;
        let is_panic = self.injection.kind == Kind::Panic && self.num_steps > self.injection.at;
        assert!(!is_panic, "injected panic");
        self.inner.decode()
    }

    fn take_finished(&mut self) -> Result<Vec<Sequence<PreprocessedImage>>> {
        self.inner.take_finished()
    }

    fn abandon(&mut self) -> Vec<PreprocessedImage> {
        self.inner.abandon()
    }
}
