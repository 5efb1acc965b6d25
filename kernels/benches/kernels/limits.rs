//! What the machine can do: integer and float peaks from registers alone, and reading memory.

use std::hint::black_box;
use std::time::Instant;

use recaption_kernels::Workers;

/// Operations a second, in billions.
pub(crate) struct Limits {
    pub(crate) int8: f64,
    pub(crate) f32: f64,
    pub(crate) read: f64,
}

pub(crate) fn measure(workers: &dyn Workers) -> Limits {
    let n = workers.num_threads();
    let best = |seconds: f64, f: &(dyn Fn(usize) + Sync), amount: f64| {
        let mut best: f64 = 0.0;
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < seconds {
            let t = Instant::now();
            workers.for_each(n, f);
            best = best.max(amount / t.elapsed().as_secs_f64() / 1e9);
        }
        best
    };
    let memory = vec![1u64; 32 << 20];
    let part = memory.len() / n;
    let read = |i: usize| {
        let sum = memory[i * part..(i + 1) * part].as_chunks::<32>().0.iter().fold([0u64; 32], |mut sum, x| {
            for (sum, x) in sum.iter_mut().zip(x) {
                *sum = sum.wrapping_add(*x);
            }
            sum
        });
        black_box(sum);
    };
    #[cfg(target_arch = "x86_64")]
    let (int8, f32) = if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        let int8 = best(0.3, &|_| unsafe { x86::int8(STEPS) }, (n * STEPS * 24 * 128) as f64);
        // SAFETY: detected.
        let f32 = best(0.3, &|_| unsafe { x86::f32(STEPS) }, (n * STEPS * 24 * 32) as f64);
        (int8, f32)
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: detected.
        let int8 = best(0.3, &|_| unsafe { x86::int8_avx2(STEPS) }, (n * STEPS * 12 * 32) as f64);
        // SAFETY: detected.
        let f32 = best(0.3, &|_| unsafe { x86::f32_avx2(STEPS) }, (n * STEPS * 12 * 16) as f64);
        (int8, f32)
    } else {
        (f64::NAN, f64::NAN)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (int8, f32) = (f64::NAN, f64::NAN);
    Limits { int8, f32, read: best(0.5, &read, (memory.len() * 8) as f64) }
}

const STEPS: usize = 100_000;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8(steps: usize) {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
        let mut acc = [_mm512_setzero_si512(); 24];
        for _ in 0..steps {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    /// Without VNNI an exact product is a multiplication in 16 bits and an addition in 32.
    #[target_feature(enable = "avx2")]
    pub(super) fn int8_avx2(steps: usize) {
        let b = black_box(_mm256_set1_epi16(5));
        let mut acc = black_box([_mm256_set1_epi16(3); 12]);
        for _ in 0..steps {
            for acc in &mut acc {
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(*acc, b));
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_avx2(steps: usize) {
        let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(1.5)));
        let mut acc = [_mm256_setzero_ps(); 12];
        for _ in 0..steps {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32(steps: usize) {
        let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(1.5)));
        let mut acc = [_mm512_setzero_ps(); 24];
        for _ in 0..steps {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }
}
