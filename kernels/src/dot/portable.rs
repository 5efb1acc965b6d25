//! Plain integer arithmetic.

use super::{COLUMNS, Dot, Sums, Tile};
use crate::simd::Portable;

impl Dot for Portable {
    #[inline]
    fn tile(self, rows: usize, tile: Tile<'_>, sums: &mut Sums) {
        tile.check(rows);
        for (r, sums) in sums.iter_mut().enumerate().take(rows) {
            *sums = *tile.init;
            for (k, b) in tile.b.iter().enumerate() {
                // SAFETY: a row and a step of a checked tile.
                let a = unsafe { tile.four(r, k) }.to_ne_bytes();
                let b = b.as_chunks::<4>().0;
                for c in 0..COLUMNS {
                    let products = (0..4).map(|i| i32::from(a[i]) * i32::from(b[c][i]));
                    sums[c] = products.fold(sums[c], i32::wrapping_add);
                }
            }
        }
    }
}
