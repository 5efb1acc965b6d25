//! Which instruction set runs: found once, lowered by `RECAPTION_CPU`.
//!
//! Results never depend on it. A [`Level`] can only be had for a processor that has its instructions, which is what makes
//! calling the kernels safe.

use std::sync::OnceLock;

use crate::Error;
use crate::simd::{Portable, Simd};

/// An instruction set that this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

/// Work that is written once and compiled for every instruction set.
///
/// `run` must be `#[inline(always)]`, so that it is compiled inside the function that enables the instructions.
pub(crate) trait Work {
    /// What it gives.
    type Output;
    /// Does it with the vectors of one instruction set.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Level {
    /// Plain Rust: right everywhere.
    pub const PORTABLE: Self = Self(Set::Portable);

    /// Every level that this processor has, weakest first.
    pub fn available() -> Vec<Self> {
        let levels = [Some(Self::PORTABLE), Self::avx2(), Self::avx_vnni(), Self::avx512(), Self::neon()];
        levels.into_iter().flatten().collect()
    }

    /// The best level that this processor has and `RECAPTION_CPU` (read at the first call) allows.
    pub fn current() -> Result<Self, Error> {
        static CURRENT: OnceLock<Result<Level, String>> = OnceLock::new();
        let current = CURRENT.get_or_init(|| match std::env::var("RECAPTION_CPU") {
            Ok(name) => Self::up_to(&name).map_err(|_| name),
            Err(_) => Ok(Self::best()),
        });
        current.clone().map_err(Error::UnknownLevel)
    }

    /// The best available level that is not above the one named.
    pub fn up_to(name: &str) -> Result<Self, Error> {
        let rank = NAMES.iter().position(|&n| n == name).ok_or_else(|| Error::UnknownLevel(name.to_owned()))?;
        Ok(Self::available().into_iter().rfind(|level| level.rank() <= rank).unwrap_or(Self::PORTABLE))
    }

    /// The name that `RECAPTION_CPU` takes.
    pub fn name(self) -> &'static str {
        NAMES[self.rank()]
    }

    fn best() -> Self {
        Self::available().pop().unwrap_or(Self::PORTABLE)
    }

    /// Whether AVX2 is there.
    pub(crate) fn has_avx2(self) -> bool {
        cfg!(target_arch = "x86_64") && self.rank() >= 1
    }

    fn rank(self) -> usize {
        match self.0 {
            Set::Portable => 0,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => 1,
            #[cfg(target_arch = "x86_64")]
            Set::AvxVnni => 2,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => 3,
            #[cfg(target_arch = "aarch64")]
            Set::Neon => 4,
        }
    }
}

const NAMES: [&str; 5] = ["portable", "avx2", "avxvnni", "avx512", "neon"];

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod detect {
    use super::{Level, Set};

    impl Level {
        pub(super) fn avx2() -> Option<Self> {
            let has =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            has.then_some(Self(Set::Avx2))
        }

        pub(super) fn avx_vnni() -> Option<Self> {
            Self::avx2().filter(|_| is_x86_feature_detected!("avxvnni")).map(|_| Self(Set::AvxVnni))
        }

        pub(super) fn avx512() -> Option<Self> {
            let has = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            Self::avx2().filter(|_| has).map(|_| Self(Set::Avx512))
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod detect {
    use super::Level;

    impl Level {
        pub(super) fn avx2() -> Option<Self> {
            None
        }

        pub(super) fn avx_vnni() -> Option<Self> {
            None
        }

        pub(super) fn avx512() -> Option<Self> {
            None
        }
    }
}

impl Level {
    /// Runs `work` with this level's vectors.
    pub(crate) fn dispatch<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            Set::Portable => work.run(Portable),
            // SAFETY: a `Level` above portable is only made after its instructions were detected.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { crate::simd::avx2::call(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::AvxVnni => unsafe { crate::simd::avx2::call_vnni(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { crate::simd::avx512::call(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Set::Neon => unsafe { crate::simd::neon::call(work) },
        }
    }
}

impl Level {
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    fn neon() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Self(Set::Neon))
    }

    #[cfg(not(all(target_arch = "aarch64", not(miri))))]
    fn neon() -> Option<Self> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_masks_what_is_above_it() {
        assert_eq!(Level::up_to("portable").expect("a name"), Level::PORTABLE);
        for level in Level::available() {
            assert_eq!(Level::up_to(level.name()).expect("its own name"), level);
        }
        assert!(Level::up_to("sse9").is_err());
    }
}
