//! How a screen's memory is laid out: pixels of some colour format, or the character cells of VGA text mode. Pure.

use bootloader_api::info::{FrameBufferInfo, PixelFormat};
use core::fmt;

/// No screen has more memory: 8K at four bytes a pixel has half of it.
const MAX_BYTES: usize = 256 << 20;
/// Bytes of a cell in text mode: character and attribute.
pub const TEXT_CELL_BYTES: usize = 2;

/// One colour's bits in a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Number of its lowest bit.
    pub position: u8,
    /// How many bits.
    pub size: u8,
}

impl Field {
    /// The highest bits of `value`, where this field has them.
    const fn encode(self, value: u8) -> u32 {
        let value = value as u32;
        if self.size >= 8 {
            value << (self.size - 8) << self.position
        } else {
            value >> (8 - self.size) << self.position
        }
    }
}

/// What the memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pixels of two to four bytes.
    Pixels {
        /// Bytes of a pixel.
        bytes: usize,
        /// Red, green, blue.
        fields: [Field; 3],
    },
    /// Characters of code page 437 with an attribute each.
    Text,
}

/// A checked layout. Every write that follows from it ends within `len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// What the memory holds.
    pub kind: Kind,
    /// Pixels or characters in a row.
    pub width: usize,
    /// Rows of pixels or characters.
    pub height: usize,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// Why a framebuffer is of no use. The loader or the firmware is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Bytes of a pixel that are none of two, three and four.
    PixelBytes(usize),
    /// The rows are shorter than the pixels in them, or the memory is shorter than the rows, or longer than any screen's.
    Size,
    /// A colour's bits lie outside of the pixel.
    Fields,
    /// It does not end within the address space, or lies in RAM that Umbra uses, or text mode is not where VGA has it.
    Place(u64),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PixelBytes(bytes) => write!(f, "it has {bytes} bytes a pixel; 2, 3 and 4 are known"),
            Self::Size => write!(f, "its width, height, pitch and size contradict each other"),
            Self::Fields => write!(f, "its colours lie outside of a pixel"),
            Self::Place(at) => write!(f, "its address {at:#x} is not that of a device's memory"),
        }
    }
}

impl Layout {
    /// The layout that a loader describes; with `text` it describes VGA's text mode, in which a pixel is a character.
    pub fn of(info: &FrameBufferInfo, text: bool) -> Result<Self, Unfit> {
        let bytes = info.bytes_per_pixel;
        let kind = if text {
            if bytes != TEXT_CELL_BYTES {
                return Err(Unfit::PixelBytes(bytes));
            }
            Kind::Text
        } else {
            if !(2..=4).contains(&bytes) {
                return Err(Unfit::PixelBytes(bytes));
            }
            Kind::Pixels { bytes, fields: fields(info.pixel_format, bytes)? }
        };
        // The stride counts pixels, which a pitch of pixels of three bytes need not; the memory's size has it exactly.
        let exact =
            info.byte_len.checked_div(info.height).filter(|pitch| pitch * info.height == info.byte_len);
        let by_stride = info.stride.checked_mul(bytes).ok_or(Unfit::Size)?;
        let row = info.width.checked_mul(bytes).ok_or(Unfit::Size)?;
        let pitch = exact.filter(|pitch| pitch / bytes.max(1) == info.stride).unwrap_or(by_stride);
        let layout = Self { kind, width: info.width, height: info.height, pitch };
        let fits = info.width > 0 && info.height > 0 && pitch >= row;
        let len = pitch.checked_mul(info.height).ok_or(Unfit::Size)?;
        if !fits || len > MAX_BYTES || len > info.byte_len {
            return Err(Unfit::Size);
        }
        Ok(layout)
    }

    /// Bytes of the memory.
    pub fn bytes(&self) -> usize {
        self.pitch * self.height
    }

    /// What reports call it.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Text => "text",
            Kind::Pixels { bytes: 2, fields } if fields[1].size < 6 => "15-bit",
            Kind::Pixels { bytes: 2, .. } => "16-bit",
            Kind::Pixels { bytes: 3, .. } => "24-bit",
            Kind::Pixels { .. } => "32-bit",
        }
    }

    /// Encodes a colour of eight bits each, as little-endian bytes of which a pixel has the first few.
    pub fn encode(fields: &[Field; 3], colour: [u8; 3]) -> [u8; 4] {
        let value = fields.iter().zip(colour).fold(0, |pixel, (field, value)| pixel | field.encode(value));
        value.to_le_bytes()
    }
}

/// Where the three colours are. A loader may tell their positions alone: a colour then reaches to the next one, and the
/// highest has no more bits than the largest of the others, which tells 15-bit from 16-bit colour.
fn fields(format: PixelFormat, bytes: usize) -> Result<[Field; 3], Unfit> {
    let positions = match format {
        PixelFormat::Rgb => [0, 8, 16],
        PixelFormat::Bgr => [16, 8, 0],
        PixelFormat::Unknown { red_position, green_position, blue_position } => {
            [red_position, green_position, blue_position]
        }
        _ => return Err(Unfit::Fields),
    };
    let bits = bytes as u8 * 8;
    if positions.iter().any(|position| *position >= bits) {
        return Err(Unfit::Fields);
    }
    let above = |position: u8| positions.into_iter().filter(move |other| *other > position).min();
    let reach = |position: u8| above(position).unwrap_or(bits) - position;
    let largest_below =
        positions.into_iter().filter(|position| above(*position).is_some()).map(reach).max().unwrap_or(bits);
    Ok(positions.map(|position| {
        let size = match above(position) {
            Some(_) => reach(position),
            None => reach(position).min(largest_below),
        };
        Field { position, size }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn info(width: usize, height: usize, bytes: usize, format: PixelFormat) -> FrameBufferInfo {
        FrameBufferInfo {
            byte_len: width * height * bytes,
            width,
            height,
            pixel_format: format,
            bytes_per_pixel: bytes,
            stride: width,
        }
    }

    const fn at(red_position: u8, green_position: u8, blue_position: u8) -> PixelFormat {
        PixelFormat::Unknown { red_position, green_position, blue_position }
    }

    fn sizes(bytes: usize, format: PixelFormat) -> [u8; 3] {
        fields(format, bytes).unwrap().map(|field| field.size)
    }

    #[test]
    fn sizes_of_colours_follow_from_their_positions() {
        assert_eq!(sizes(2, at(11, 5, 0)), [5, 6, 5]);
        assert_eq!(sizes(2, at(10, 5, 0)), [5, 5, 5], "15-bit colour");
        assert_eq!(sizes(2, at(0, 5, 11)), [5, 6, 5]);
        assert_eq!(sizes(4, at(20, 10, 0)), [10, 10, 10]);
        assert_eq!(sizes(3, PixelFormat::Bgr), [8, 8, 8]);
        assert_eq!(sizes(4, PixelFormat::Rgb), [8, 8, 8]);
        assert_eq!(sizes(4, at(24, 16, 8)), [8, 8, 8]);
        assert_eq!(fields(at(16, 8, 0), 2), Err(Unfit::Fields));
        assert_eq!(fields(PixelFormat::U8, 4), Err(Unfit::Fields));
    }

    #[test]
    fn colours_are_encoded_by_their_highest_bits() {
        let encode = |bytes, format, colour| {
            u32::from_le_bytes(Layout::encode(&fields(format, bytes).unwrap(), colour))
        };
        assert_eq!(encode(4, PixelFormat::Bgr, [0x12, 0x34, 0x56]), 0x12_3456);
        assert_eq!(encode(4, PixelFormat::Rgb, [0x12, 0x34, 0x56]), 0x56_3412);
        assert_eq!(encode(2, at(11, 5, 0), [0xff, 0, 0xff]), 0xf81f);
        assert_eq!(encode(2, at(10, 5, 0), [0xff, 0xff, 0xff]), 0x7fff);
        assert_eq!(encode(4, at(20, 10, 0), [0xff, 0, 1]), 0x3fc << 20 | 4);
    }

    #[test]
    fn a_pitch_need_not_be_whole_pixels() {
        // 1366 pixels of three bytes, rows padded to a multiple of four.
        let odd =
            FrameBufferInfo { byte_len: 4100 * 768, stride: 1366, ..info(1366, 768, 3, PixelFormat::Bgr) };
        assert_eq!(Layout::of(&odd, false).unwrap().pitch, 4100);
        assert_eq!(Layout::of(&odd, false).unwrap().name(), "24-bit");
        let padded =
            FrameBufferInfo { byte_len: 3328 * 600, stride: 832, ..info(800, 600, 4, PixelFormat::Bgr) };
        assert_eq!(Layout::of(&padded, false).unwrap().pitch, 3328);
        let longer = FrameBufferInfo { byte_len: 4 << 20, ..info(800, 600, 4, PixelFormat::Bgr) };
        assert_eq!(
            Layout::of(&longer, false).unwrap().pitch,
            3200,
            "memory behind the last row does no harm"
        );
    }

    #[test]
    fn contradictions_are_refused() {
        let good = info(800, 600, 4, PixelFormat::Bgr);
        for bad in [
            FrameBufferInfo { width: 0, ..good },
            FrameBufferInfo { height: 0, byte_len: 0, ..good },
            FrameBufferInfo { stride: 799, ..good },
            FrameBufferInfo { byte_len: 800 * 599 * 4, ..good },
            FrameBufferInfo { width: usize::MAX, ..good },
            FrameBufferInfo { stride: usize::MAX, ..good },
            FrameBufferInfo { height: usize::MAX, ..good },
            FrameBufferInfo { height: 1 << 20, byte_len: 3200 << 20, ..good },
        ] {
            assert_eq!(Layout::of(&bad, false), Err(Unfit::Size), "{bad:?}");
        }
        for bytes in [0, 1, 5, 8] {
            let bad = FrameBufferInfo { bytes_per_pixel: bytes, ..good };
            assert_eq!(Layout::of(&bad, false), Err(Unfit::PixelBytes(bytes)));
        }
    }

    #[test]
    fn text_mode_is_known() {
        let layout = Layout::of(&info(80, 25, 2, PixelFormat::U8), true).unwrap();
        assert_eq!((layout.kind, layout.pitch, layout.bytes()), (Kind::Text, 160, 4000));
        assert_eq!(layout.name(), "text");
        assert_eq!(Layout::of(&info(80, 25, 4, PixelFormat::U8), true), Err(Unfit::PixelBytes(4)));
    }

    proptest! {
        #[test]
        fn what_is_accepted_holds_together(
            width: usize, height in prop_oneof![0usize..3000, any::<usize>()], bytes in 0usize..6,
            stride in prop_oneof![0usize..5000, any::<usize>()], byte_len: usize,
            positions in any::<[u8; 3]>(),
        ) {
            let width = width % 6000;
            let [red_position, green_position, blue_position] = positions.map(|p| p % 40);
            let pixel_format = PixelFormat::Unknown { red_position, green_position, blue_position };
            let info =
                FrameBufferInfo { byte_len, width, height, pixel_format, bytes_per_pixel: bytes, stride };
            if let Ok(layout) = Layout::of(&info, false) {
                prop_assert!(layout.pitch >= width * bytes && layout.bytes() <= byte_len);
                if let Kind::Pixels { fields, .. } = layout.kind {
                    for field in fields {
                        prop_assert!(field.size > 0 && usize::from(field.position + field.size) <= bytes * 8);
                    }
                }
            }
        }
    }
}
