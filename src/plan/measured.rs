//! From measured batches to the practice of a stage: how many times longer than ideal each part of its work takes.
//!
//! A stage's batches differ in size and in what their captions see, which tells the parts apart: a step over one
//! caption is all weights, one over many is products and cache too. Where a run had batches of one kind only, they do
//! not; then all parts are taken to be off by the same factor. In between both count: a least-squares fit of the
//! relative error, with that common factor as a faint prior, and no part negative. Last, all factors are scaled so that
//! the batches add up to the time they took.

use crate::plan::roofline::{Ideal, Practice};

/// Batches of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// What one of them takes at the device's peaks.
    pub ideal: Ideal,
    /// How many there were.
    pub count: f64,
    /// Their mean seconds.
    pub seconds: f64,
}

/// How much the prior weighs beside all batches: as where their times are off by 5 % (a machine gets slower and faster within a
/// run), and the parts' factors by as much as themselves. With less, captions that grow while the machine gets slower look like
/// a slow cache.
const PRIOR: f64 = 3e-3;
const NUM_ROUNDS: usize = 500;

/// Fits the practice of one stage; none without a batch that took any time.
#[must_use]
pub fn fit(samples: &[Sample]) -> Option<Practice> {
    let samples: Vec<&Sample> = samples.iter().filter(|sample| sample.count > 0.0 && sample.seconds > 0.0).collect();
    let sum = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(|sample| sample.count * of(sample)).sum::<f64>();
    let ideal = sum(&|sample| sample.ideal.parts().iter().sum());
    let (num_batches, seconds) = (sum(&|_| 1.0), sum(&|sample| sample.seconds));
    if ideal <= 0.0 || seconds <= 0.0 {
        return None;
    }
    let common = seconds / ideal;
    // Each row: the share of a batch's time that each part takes with the common factor. Sought are factors about 1 on those.
    let rows: Vec<([f64; 3], f64)> = samples
        .iter()
        .map(|sample| (sample.ideal.parts().map(|part| part * common / sample.seconds), sample.count / num_batches))
        .collect();
    let mut factors = [1.0_f64; 3];
    // Coordinate descent on a convex function: no part ever gets negative.
    for _ in 0..NUM_ROUNDS {
        for part in 0..3 {
            let (mut numerator, mut denominator) = (PRIOR, PRIOR);
            for (shares, weight) in &rows {
                let others: f64 =
                    (0..3).filter(|&other| other != part).map(|other| factors[other] * shares[other]).sum();
                numerator += weight * shares[part] * (1.0 - others);
                denominator += weight * shares[part] * shares[part];
            }
            factors[part] = (numerator / denominator).max(0.0);
        }
    }
    let parts_of = |sample: &Sample| {
        sample.ideal.parts().into_iter().zip(factors).map(|(part, factor)| part * factor).sum::<f64>()
    };
    let scale = seconds / sum(&parts_of).max(f64::MIN_POSITIVE);
    let [weights, products, cache] = factors.map(|factor| factor * scale);
    Some(Practice::Measured { weights, products, cache })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(batch: f64, context: f64, seconds: f64) -> Sample {
        Sample { ideal: Ideal { weights: 4e-3, products: batch * 3e-4, cache: context * 1e-6 }, count: 10.0, seconds }
    }

    /// Steps that take 1.2, 2 and 3 times as long as ideal in their three parts.
    fn truth(batch: f64, context: f64) -> f64 {
        1.2 * 4e-3 + 2.0 * batch * 3e-4 + 3.0 * context * 1e-6
    }

    #[test]
    fn batches_of_many_sizes_tell_the_parts_apart() {
        let sizes = [(1.0, 300.0), (4.0, 1000.0), (16.0, 6000.0), (16.0, 3200.0), (8.0, 2000.0)];
        let samples = sizes.map(|(batch, context)| sample(batch, context, truth(batch, context)));
        let practice = fit(&samples).unwrap();
        for (batch, context) in [(2.0, 500.0), (32.0, 9000.0), (64.0, 20_000.0)] {
            let told = practice.seconds(sample(batch, context, 1.0).ideal);
            assert!((told / truth(batch, context) - 1.0).abs() < 0.02, "{batch}: {told} {}", truth(batch, context));
        }
    }

    #[test]
    fn batches_of_one_size_scale_all_parts_alike() {
        let only = sample(16.0, 4000.0, truth(16.0, 4000.0));
        let practice = fit(&[only]).unwrap();
        assert!((practice.seconds(only.ideal) / only.seconds - 1.0).abs() < 1e-3);
        let Practice::Measured { weights, products, cache } = practice else { panic!("{practice:?}") };
        let common = only.seconds / only.ideal.parts().iter().sum::<f64>();
        for factor in [weights, products, cache] {
            assert!((factor / common - 1.0).abs() < 0.05, "{practice:?}, common {common}");
        }
    }

    /// Steps over 24 captions of a machine that got slower by a third while the captions grew by a tenth.
    #[test]
    fn a_machine_that_gets_slower_is_no_slow_cache() {
        let ideal = |context: f64| Ideal { weights: 28e-3, products: 62e-3, cache: context * 3.4e-6 };
        let samples = [(5800.0, 0.21), (6400.0, 0.27)].map(|(context, seconds)| Sample {
            ideal: ideal(context),
            count: 50.0,
            seconds,
        });
        let practice = fit(&samples).unwrap();
        let Practice::Measured { weights, products, cache } = practice else { panic!("{practice:?}") };
        assert!(weights > 1.5 && products > 1.5 && cache < 2.0 * products, "{practice:?}");
        let told: f64 = samples.iter().map(|sample| practice.seconds(sample.ideal)).sum();
        assert!((told / 0.48 - 1.0).abs() < 1e-9, "{told}");
    }

    #[test]
    fn noise_gives_no_negative_parts_and_nothing_gives_nothing() {
        // Larger batches that took less long.
        let samples =
            [(1.0, 300.0, 9e-3), (8.0, 2400.0, 6e-3)].map(|(batch, context, seconds)| sample(batch, context, seconds));
        let Some(Practice::Measured { weights, products, cache }) = fit(&samples) else { panic!("a fit") };
        assert!(weights > 0.0 && products >= 0.0 && cache >= 0.0);
        assert_eq!(fit(&[]), None);
        assert_eq!(fit(&[sample(1.0, 1.0, 0.0)]), None);
    }
}
