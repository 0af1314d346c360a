//! Cells into a screen's memory: glyphs as pixels, or characters with their attributes. Pure.

use super::cell::Cell;
use super::format::{Field, Kind, Layout, TEXT_CELL_BYTES};
use super::grid::{MAX_COLUMNS, MAX_ROWS};
use noto_sans_mono_bitmap::{get_raster, get_raster_width, FontWeight, RasterHeight};

const WEIGHT: FontWeight = FontWeight::Regular;

/// The memory of a screen.
pub trait Pixels {
    /// Writes bytes at an offset that the screen's layout has.
    fn write(&mut self, offset: usize, bytes: &[u8]);
}

/// Red, green and blue of the sixteen colours, as VGA's palette has them.
const PALETTE: [[u8; 3]; 16] = [
    [0x00, 0x00, 0x00],
    [0xaa, 0x00, 0x00],
    [0x00, 0xaa, 0x00],
    [0xaa, 0x55, 0x00],
    [0x00, 0x00, 0xaa],
    [0xaa, 0x00, 0xaa],
    [0x00, 0xaa, 0xaa],
    [0xaa, 0xaa, 0xaa],
    [0x55, 0x55, 0x55],
    [0xff, 0x55, 0x55],
    [0x55, 0xff, 0x55],
    [0xff, 0xff, 0x55],
    [0x55, 0x55, 0xff],
    [0xff, 0x55, 0xff],
    [0x55, 0xff, 0xff],
    [0xff, 0xff, 0xff],
];

/// A layout and the font for it.
#[derive(Clone, Copy, Debug)]
pub struct Painter {
    layout: Layout,
    font: RasterHeight,
}

impl Painter {
    /// A painter for a layout, with the larger font where the smaller one would make more text than a grid has.
    pub fn new(layout: Layout) -> Self {
        let small = Self { layout, font: RasterHeight::Size16 };
        let (columns, rows) = small.cells();
        match columns > MAX_COLUMNS || rows > MAX_ROWS {
            true => Self { font: RasterHeight::Size32, ..small },
            false => small,
        }
    }

    /// The layout it was made for.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How many columns and rows of text there is room for.
    pub fn cells(&self) -> (usize, usize) {
        let (width, height) = self.cell_size();
        (self.layout.width / width, self.layout.height / height)
    }

    /// Width and height of a cell, in units of the layout.
    fn cell_size(&self) -> (usize, usize) {
        match self.layout.kind {
            Kind::Pixels { .. } => (get_raster_width(WEIGHT, self.font), self.font.val()),
            Kind::Text => (1, 1),
        }
    }

    /// Blackens everything.
    pub fn clear(&self, memory: &mut impl Pixels) {
        // Zeros are black in every pixel format, and in text mode a character without a picture.
        let zeros = [0; 1024];
        for row in 0..self.layout.height {
            let (start, end) = (row * self.layout.pitch, (row + 1) * self.layout.pitch);
            for offset in (start..end).step_by(zeros.len()) {
                memory.write(offset, &zeros[..zeros.len().min(end - offset)]);
            }
        }
    }

    /// Paints a cell, which must be one of those that there is room for.
    pub fn paint(&self, memory: &mut impl Pixels, row: usize, column: usize, cell: Cell) {
        match self.layout.kind {
            Kind::Text => {
                let offset = row * self.layout.pitch + column * TEXT_CELL_BYTES;
                memory.write(offset, &text_cell(cell));
            }
            Kind::Pixels { bytes, fields } => self.paint_glyph(memory, row, column, cell, bytes, &fields),
        }
    }

    fn paint_glyph(
        &self,
        memory: &mut impl Pixels,
        row: usize,
        column: usize,
        cell: Cell,
        bytes: usize,
        fields: &[Field; 3],
    ) {
        let colour = |number: u8| PALETTE[usize::from(number) % PALETTE.len()];
        let (foreground, background) = (colour(cell.foreground()), colour(cell.background()));
        let [full, none] = [foreground, background].map(|colour| Layout::encode(fields, colour));
        let Some(glyph) = get_raster(cell.character(), WEIGHT, self.font)
            .or_else(|| get_raster(char::REPLACEMENT_CHARACTER, WEIGHT, self.font))
        else {
            return;
        };
        let (width, height) = self.cell_size();
        let first = row * height * self.layout.pitch + column * width * bytes;
        // The widest glyph has 14 pixels of at most four bytes.
        let mut line = [0; 64];
        for (y, intensities) in glyph.rows().enumerate() {
            for (pixel, &intensity) in line.chunks_exact_mut(bytes).zip(intensities) {
                let value = match intensity {
                    0 => none,
                    u8::MAX => full,
                    _ => Layout::encode(fields, blend(foreground, background, intensity)),
                };
                pixel.copy_from_slice(&value[..bytes]);
            }
            let used = (intensities.len() * bytes).min(line.len());
            memory.write(first + y * self.layout.pitch, &line[..used]);
        }
    }
}

/// A colour between two others.
fn blend(foreground: [u8; 3], background: [u8; 3], intensity: u8) -> [u8; 3] {
    let share = u32::from(intensity);
    core::array::from_fn(|n| {
        ((u32::from(foreground[n]) * share + u32::from(background[n]) * (255 - share)) / 255) as u8
    })
}

/// Character and attribute of text mode. Its attributes have red and blue the other way round, and the highest bit may
/// mean blinking, so a bright background is the dark one.
fn text_cell(cell: Cell) -> [u8; TEXT_CELL_BYTES] {
    let swap = |colour: u8| colour & 0b1010 | colour >> 2 & 1 | (colour & 1) << 2;
    [code_page_437(cell.character()), (swap(cell.background()) & 7) << 4 | swap(cell.foreground())]
}

/// A character as VGA's font has it: ASCII as it is, some of Latin-1, and a question mark for the rest.
fn code_page_437(character: char) -> u8 {
    /// The letters from 80h to A5h.
    const LETTERS: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑ";
    match character {
        ' '..='~' => character as u8,
        '°' => 0xf8,
        '±' => 0xf1,
        'ß' => 0xe1,
        'µ' => 0xe6,
        '«' => 0xae,
        '»' => 0xaf,
        '·' => 0xfa,
        _ => LETTERS.chars().position(|letter| letter == character).map_or(b'?', |n| 0x80 + n as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::screen::cell::{BLACK, WHITE};
    use bootloader_api::info::{FrameBufferInfo, PixelFormat};

    /// Memory that refuses what lies outside of it, as a mapping would.
    impl Pixels for Vec<u8> {
        fn write(&mut self, offset: usize, bytes: &[u8]) {
            self[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn painter(
        width: usize,
        height: usize,
        bytes: usize,
        pitch: usize,
        pixel_format: PixelFormat,
    ) -> Painter {
        let info = FrameBufferInfo {
            byte_len: pitch * height,
            width,
            height,
            pixel_format,
            bytes_per_pixel: bytes,
            stride: pitch / bytes,
        };
        Painter::new(Layout::of(&info, false).unwrap())
    }

    #[test]
    fn a_glyph_is_its_raster_in_the_cells_colours() {
        let painter = painter(70, 32, 4, 300, PixelFormat::Bgr);
        assert_eq!(painter.cells(), (10, 2));
        let mut memory = vec![0x11; 300 * 32];
        painter.paint(&mut memory, 1, 3, Cell::new('A', 9, 4));
        let raster = get_raster('A', WEIGHT, RasterHeight::Size16).unwrap();
        for (y, row) in raster.rows().enumerate() {
            for (x, &intensity) in row.iter().enumerate() {
                let at = (16 + y) * 300 + (21 + x) * 4;
                let blended = blend(PALETTE[9], PALETTE[4], intensity);
                assert_eq!(memory[at..at + 4], [blended[2], blended[1], blended[0], 0], "{x} {y}");
            }
        }
        let in_cell = |at: usize| (16..32).contains(&(at / 300)) && (84..112).contains(&(at % 300));
        assert!(
            memory.iter().enumerate().all(|(at, byte)| in_cell(at) || *byte == 0x11),
            "nothing beside it"
        );
    }

    #[test]
    fn every_cell_of_every_depth_fits() {
        let at = |red_position, green_position, blue_position| PixelFormat::Unknown {
            red_position,
            green_position,
            blue_position,
        };
        for (bytes, format) in
            [(2, at(10, 5, 0)), (2, at(11, 5, 0)), (3, PixelFormat::Rgb), (4, at(8, 16, 24))]
        {
            let painter = painter(85, 37, bytes, 85 * bytes, format);
            let (columns, rows) = painter.cells();
            let mut memory = vec![0; painter.layout().bytes()];
            for row in 0..rows {
                for column in 0..columns {
                    painter.paint(&mut memory, row, column, Cell::new('\u{fffd}', BLACK, WHITE));
                }
            }
            painter.clear(&mut memory);
            assert!(memory.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn large_screens_get_the_large_font() {
        let cells = |width, height| painter(width, height, 4, width * 4, PixelFormat::Bgr).cells();
        assert_eq!(cells(1920, 1200), (274, 75));
        assert_eq!(cells(3840, 2160), (274, 67));
        assert_eq!(cells(1200, 1920), (85, 60));
    }

    #[test]
    fn text_mode_has_characters_and_attributes() {
        assert_eq!(text_cell(Cell::BLANK), [b' ', 0x07]);
        assert_eq!(text_cell(Cell::new('é', 1, 4)), [0x82, 0x14], "red on blue");
        assert_eq!(text_cell(Cell::new('€', 14, 11)), [b'?', 0x6b], "bright cyan on bright yellow");
        assert_eq!([code_page_437('Ñ'), code_page_437('±'), code_page_437('\u{7f}')], [0xa5, 0xf1, b'?']);
    }

    #[test]
    fn blending_ends_at_the_two_colours() {
        assert_eq!(blend([255, 0, 7], [0, 255, 7], 255), [255, 0, 7]);
        assert_eq!(blend([255, 0, 7], [0, 255, 7], 0), [0, 255, 7]);
        assert_eq!(blend([255, 0, 7], [0, 255, 7], 51), [51, 204, 7]);
    }
}
