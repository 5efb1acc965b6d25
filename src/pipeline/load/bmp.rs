//! BMP headers that `image` does not read and Pillow does, in the form that it reads.

use std::borrow::Cow;

const FILE_HEADER_BYTES: usize = 14;
const WINDOWS_HEADER_BYTES: usize = 40;
/// OS/2 2.x: the fields of Windows' header, then 24 bytes about printing.
const OS2_HEADER_BYTES: usize = 64;

/// `bytes` with a header of Windows', and whether the rows are to be turned upside down afterwards.
pub(super) fn normalised(bytes: &[u8]) -> (Cow<'_, [u8]>, bool) {
    let unchanged = (Cow::Borrowed(bytes), false);
    let Some(header) = bytes.get(..FILE_HEADER_BYTES + WINDOWS_HEADER_BYTES) else { return unchanged };
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (header_size, height, compression) = (u32_at(14) as usize, u32_at(22).cast_signed(), u32_at(30));
    if header_size < WINDOWS_HEADER_BYTES {
        return unchanged;
    }
    // What else OS/2 compresses with is not what Windows has under the same number.
    let is_os2 =
        header_size == OS2_HEADER_BYTES && bytes.len() >= FILE_HEADER_BYTES + OS2_HEADER_BYTES && compression <= 2;
    // The format knows no such rows from the top.
    let is_turned = matches!(compression, 1 | 2) && height < 0;
    let has_odd_planes = header[26..28] != [1, 0];
    if !is_os2 && !is_turned && !has_odd_planes {
        return unchanged;
    }
    let mut normal = bytes.to_vec();
    normal[26..28].copy_from_slice(&[1, 0]);
    if is_turned {
        normal[22..26].copy_from_slice(&height.wrapping_neg().to_le_bytes());
    }
    if is_os2 {
        let num_extra = OS2_HEADER_BYTES - WINDOWS_HEADER_BYTES;
        normal.drain(FILE_HEADER_BYTES + WINDOWS_HEADER_BYTES..FILE_HEADER_BYTES + OS2_HEADER_BYTES);
        let pixels_at = u32_at(10).saturating_sub(num_extra as u32);
        normal[10..14].copy_from_slice(&pixels_at.to_le_bytes());
        normal[14..18].copy_from_slice(&(WINDOWS_HEADER_BYTES as u32).to_le_bytes());
    }
    (Cow::Owned(normal), is_turned)
}
