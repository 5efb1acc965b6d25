//! A run in miniature: engines that take images from one queue, a batch at a time, as `pipeline/engine.rs` does (all
//! free slots are filled before a step), with given times for their batches. Gives the time of a run of any length, its
//! first and last captions included, when slots are not full.

use crate::plan::roofline::{Costs, EnginePractice};

/// What the engines of one device do.
#[derive(Clone, Debug)]
pub struct Workload<'a> {
    /// Times of batches at the device's peaks.
    pub costs: Costs<'a>,
    /// How far from them.
    pub practice: EnginePractice,
    /// Engines that share the images.
    pub num_engines: usize,
    /// Captions in flight in each.
    pub num_slots: usize,
    /// Most images encoded and prefilled at once.
    pub vision_batch: usize,
    /// Tokens of prompt and image.
    pub prompt: usize,
    /// New tokens of captions, one after the other and over again.
    pub new_tokens: Vec<usize>,
    /// Seconds between two images that become ready for the engines; 0 when they always are.
    pub seconds_per_ready_image: f64,
    /// Seconds of an engine's thread for each caption beside its batches.
    pub seconds_per_caption: f64,
    /// Seconds of a run before its first batch and after its last.
    pub seconds_per_run: f64,
}

/// What a run took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timeline {
    /// From the first image to the last caption.
    pub seconds: f64,
    /// Of all engines, in vision tower and projector.
    pub vision: f64,
    /// In prefill.
    pub prefill: f64,
    /// In decode, and in what follows when a caption ends.
    pub decode: f64,
    /// Waiting for images, while others were still to come or to be captioned.
    pub idle: f64,
    /// Decode steps.
    pub num_steps: u64,
    /// Captions of all steps.
    pub num_step_captions: u64,
}

/// One engine.
#[derive(Default)]
struct Engine {
    clock: f64,
    /// Captions in flight: tokens in the cache, and new tokens still to come.
    active: Vec<(usize, usize)>,
}

/// Waves of full slots that are simulated before a rate is taken for steady.
const NUM_WAVES: usize = 16;

impl Workload<'_> {
    /// A run over `num_images`.
    #[must_use]
    pub fn simulate(&self, num_images: usize) -> Timeline {
        let mut timeline = Timeline::default();
        let mut engines: Vec<Engine> = (0..self.num_engines.max(1)).map(|_| Engine::default()).collect();
        let mut next_image = 0;
        // Always the engine that is furthest behind.
        while let Some(engine) = engines
            .iter_mut()
            .filter(|engine| next_image < num_images || !engine.active.is_empty())
            .min_by(|a, b| a.clock.total_cmp(&b.clock))
        {
            if !self.start(engine, &mut next_image, num_images, &mut timeline) {
                self.step(engine, &mut timeline);
            }
        }
        timeline.seconds = engines.iter().map(|engine| engine.clock).fold(0.0, f64::max);
        timeline.idle = timeline.seconds * engines.len() as f64 - timeline.vision - timeline.prefill - timeline.decode;
        timeline
    }

    /// The rest of a long run, once slots are full: a timeline of as many images as it says.
    #[must_use]
    pub fn steady(&self) -> (usize, Timeline) {
        let wave = self.num_engines.max(1) * self.num_slots;
        let (short, long) = (NUM_WAVES * wave, 2 * NUM_WAVES * wave);
        let (a, b) = (self.simulate(short), self.simulate(long));
        let difference = Timeline {
            seconds: b.seconds - a.seconds,
            vision: b.vision - a.vision,
            prefill: b.prefill - a.prefill,
            decode: b.decode - a.decode,
            idle: b.idle - a.idle,
            num_steps: b.num_steps - a.num_steps,
            num_step_captions: b.num_step_captions - a.num_step_captions,
        };
        (long - short, difference)
    }

    /// Seconds of a run over `num_images`, however many: what is beyond a simulated beginning and end goes at the steady rate.
    #[must_use]
    pub fn seconds(&self, num_images: f64) -> f64 {
        let (steady_images, steady) = self.steady();
        if num_images <= 2.0 * steady_images as f64 {
            return self.seconds_per_run + self.simulate(num_images as usize).seconds;
        }
        let beginning = self.simulate(steady_images).seconds;
        self.seconds_per_run + beginning + (num_images - steady_images as f64) * steady.seconds / steady_images as f64
    }

    /// Encodes and prefills a batch, if a slot is free and an image ready.
    fn start(&self, engine: &mut Engine, next_image: &mut usize, num_images: usize, timeline: &mut Timeline) -> bool {
        let num_free = (self.num_slots - engine.active.len()).min(self.vision_batch).min(num_images - *next_image);
        if num_free == 0 {
            return false;
        }
        let ready_at = |image: usize| (image + 1) as f64 * self.seconds_per_ready_image;
        if engine.active.is_empty() {
            engine.clock = engine.clock.max(ready_at(*next_image));
        }
        let batch = (0..num_free).take_while(|i| ready_at(*next_image + i) <= engine.clock).count();
        if batch == 0 {
            return false;
        }
        let vision = self.practice.vision.seconds(self.costs.vision(batch as f64));
        let prefill = self.practice.prefill.seconds(self.costs.prefill(batch as f64));
        let beside = batch as f64 * self.seconds_per_caption;
        engine.clock += vision + prefill + beside;
        timeline.vision += vision;
        timeline.prefill += prefill;
        timeline.decode += beside;
        for image in *next_image..*next_image + batch {
            // Prefill gives the first.
            let left = self.new_tokens[image % self.new_tokens.len()].saturating_sub(1);
            engine.active.push((self.prompt, left));
        }
        *next_image += batch;
        engine.active.retain(|&(_, left)| left > 0);
        true
    }

    fn step(&self, engine: &mut Engine, timeline: &mut Timeline) {
        let num_active = engine.active.len();
        if num_active == 0 {
            return;
        }
        engine.active.iter_mut().for_each(|(cached, left)| (*cached, *left) = (*cached + 1, *left - 1));
        let context: usize = engine.active.iter().map(|&(cached, _)| cached).sum();
        let seconds = self.practice.decode.seconds(self.costs.decode(num_active as f64, context as f64));
        engine.clock += seconds;
        timeline.decode += seconds;
        timeline.num_steps += 1;
        timeline.num_step_captions += num_active as u64;
        engine.active.retain(|&(_, left)| left > 0);
    }
}

#[cfg(test)]
mod tests {
    use recaption_export::{Precision, Target};

    use super::*;
    use crate::plan::device::Device;
    use crate::plan::model::{Form, Model};
    use crate::plan::roofline::Practice;

    /// Each stage as fast as the device.
    const PERFECT: EnginePractice = {
        let practice = Practice::Assumed { products: 1.0, memory: 1.0, overhead: 0.0 };
        EnginePractice { vision: practice, prefill: practice, decode: practice }
    };

    fn with_workload(test: impl FnOnce(Workload<'_>)) {
        let model = Model::find("llava-llama-3-8b", Form { precision: Precision::Fp16, target: Target::Ort }).unwrap();
        let device = Device::of_kind("h100-sxm").unwrap();
        let costs = Costs::new(&model, &device, (616, 0)).unwrap();
        test(Workload {
            costs,
            practice: PERFECT,
            num_engines: 1,
            num_slots: 4,
            vision_batch: 2,
            prompt: 616,
            new_tokens: vec![3],
            seconds_per_ready_image: 0.0,
            seconds_per_caption: 0.0,
            seconds_per_run: 0.0,
        });
    }

    /// Four slots filled by two batches, then two steps; six images are one such wave and a half.
    #[test]
    fn a_run_is_the_sum_of_its_batches() {
        with_workload(|workload| {
            let costs = workload.costs;
            let start = costs.vision(2.0).roofline() + costs.prefill(2.0).roofline();
            let steps = |batch: f64| -> f64 {
                [617.0, 618.0].map(|seen| costs.decode(batch, batch * seen).roofline()).iter().sum()
            };
            let expected = 3.0 * start + steps(4.0) + steps(2.0);
            let timeline = workload.simulate(6);
            assert!((timeline.seconds / expected - 1.0).abs() < 1e-9, "{timeline:?}, expected {expected}");
            assert_eq!((timeline.num_steps, timeline.num_step_captions), (4, 12));
            assert!(timeline.idle.abs() < 1e-9);
        });
    }

    #[test]
    fn engines_share_images_and_slow_preprocessing_limits_them() {
        with_workload(|workload| {
            let one = workload.simulate(64).seconds;
            let two = Workload { num_engines: 2, ..workload.clone() }.simulate(64).seconds;
            assert!((one / two - 2.0).abs() < 0.01, "{one} {two}");
            let starved = Workload { seconds_per_ready_image: 1.0, ..workload.clone() };
            let timeline = starved.simulate(16);
            assert!((16.0..16.2).contains(&timeline.seconds) && timeline.idle > 15.0, "{timeline:?}");
            let (num_images, steady) = starved.steady();
            assert!((steady.seconds / num_images as f64 - 1.0).abs() < 0.01);
        });
    }

    /// Two engines with room for all eight images: each takes half of them, since a batch takes as long in either.
    #[test]
    fn engines_take_turns_and_what_is_beside_their_batches_counts() {
        with_workload(|workload| {
            let workload = Workload { num_engines: 2, num_slots: 8, ..workload };
            let shared = workload.seconds(8.0);
            let alone = Workload { num_engines: 1, ..workload.clone() }.seconds(4.0);
            assert!((shared / alone - 1.0).abs() < 1e-9, "{shared} {alone}");
            let slower = Workload { seconds_per_caption: 0.5, seconds_per_run: 3.0, ..workload };
            assert!((slower.seconds(8.0) - shared - 4.0 * 0.5 - 3.0).abs() < 1e-9);
        });
    }

    #[test]
    fn long_runs_go_at_the_steady_rate_and_meet_the_simulated_ones() {
        with_workload(|workload| {
            let workload = Workload { new_tokens: vec![40, 3, 17, 60], num_slots: 8, ..workload };
            for num_images in [1, 7, 100, 500, 2000] {
                let (exact, told) = (workload.simulate(num_images).seconds, workload.seconds(num_images as f64));
                assert!((told / exact - 1.0).abs() < 0.02, "{num_images}: {told}, exactly {exact}");
            }
            let (num_images, steady) = workload.steady();
            let occupied = steady.num_step_captions as f64 / steady.num_steps as f64 / 8.0;
            assert!(occupied > 0.98, "slots are full while there are images: {occupied}");
            assert!(workload.seconds(1e9) / 1e9 < 1.001 * steady.seconds / num_images as f64);
        });
    }
}
