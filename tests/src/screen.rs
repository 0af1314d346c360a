//! Looks at the screen of a machine and types on its keyboard, through QEMU's monitor.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use noto_sans_mono_bitmap::{get_raster, get_raster_width, FontWeight, RasterHeight};
use xtask::bundle::Bundle;
use xtask::emulator::{line_regex, Machine};

use crate::context::{Ctx, Vm};

/// How a character is shown that is none of ASCII, such as the one under the cursor.
const UNKNOWN: char = '\u{2588}';
/// The grey of text that nothing has coloured: white of VGA's palette.
const TEXT_GREY: u32 = 0xaa;
/// How often the screen is looked at.
const INTERVAL: Duration = Duration::from_millis(500);

/// A machine without COM1, its standard input and output being QEMU's monitor.
pub(crate) struct Screen {
    vm: Vm,
    dir: PathBuf,
    glyphs: HashMap<Vec<u8>, char>,
    /// Text mode instead of a framebuffer.
    text_mode: bool,
}

impl Screen {
    pub(crate) fn boot(ctx: &Ctx, machine: &Machine, bundle: &Bundle) -> Result<Self> {
        ensure!(!machine.hardware.com1 && machine.hardware.screen, "no machine to look at");
        let mut vm = ctx.boot(machine, bundle)?;
        vm.expect("\\(qemu\\)")?;
        Ok(Self { vm, dir: machine.dir.clone(), glyphs: glyphs(), text_mode: false })
    }

    /// The same, but VGA's text mode is what is looked at.
    pub(crate) fn in_text_mode(self) -> Self {
        Self { text_mode: true, ..self }
    }

    /// Waits until a line of the screen matches; the whole line.
    pub(crate) fn expect(&mut self, pattern: &str) -> Result<String> {
        let regex = line_regex(pattern)?;
        loop {
            let lines = self.lines().unwrap_or_default();
            if let Some(line) = lines.iter().find(|line| regex.is_match(line.as_bytes())) {
                return Ok(line.clone());
            }
            if self.vm.remaining().is_zero() {
                bail!("/{pattern}/ did not appear on the screen, which shows:\n{}", lines.join("\n"));
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Types a line on the keyboard.
    pub(crate) fn type_line(&mut self, line: &str) -> Result<()> {
        for character in line.chars() {
            let key = match character {
                ' ' => "spc".into(),
                'a'..='z' | '0'..='9' => character.to_string(),
                other => bail!("{other:?} has no key here"),
            };
            self.key(&key)?;
        }
        self.key("ret")
    }

    /// Presses a key, by QEMU's name.
    pub(crate) fn key(&mut self, name: &str) -> Result<()> {
        self.command(&format!("sendkey {name} 20"))?;
        std::thread::sleep(Duration::from_millis(60));
        Ok(())
    }

    /// Whether the machine is still on.
    pub(crate) fn is_on(&mut self) -> bool {
        self.command("info status").is_ok()
    }

    /// What the screen shows now.
    fn lines(&mut self) -> Result<Vec<String>> {
        let file = self.dir.join("screen");
        // A machine that is being switched off leaves none.
        let _ = fs::remove_file(&file);
        if self.text_mode {
            self.command(&format!("pmemsave 0xb8000 4000 \"{}\"", file.display()))?;
            return Ok(text_lines(&fs::read(&file)?));
        }
        self.command(&format!("screendump \"{}\"", file.display()))?;
        read_pixels(&fs::read(&file)?, &self.glyphs)
    }

    fn command(&mut self, command: &str) -> Result<()> {
        self.vm.type_line(command)?;
        // The monitor echoes a command piece by piece, and its answer begins a new line.
        self.vm.expect("^\\(qemu\\)")?;
        Ok(())
    }
}

/// The ASCII glyphs of the console's small font, as rows of pixels, and what they mean.
fn glyphs() -> HashMap<Vec<u8>, char> {
    let raster = |c| get_raster(c, FontWeight::Regular, RasterHeight::Size16).map(|raster| raster.pixels());
    (' '..='~')
        .filter_map(|c| {
            Some((raster(c)?.iter().map(|&p| shade(u32::from(p) * TEXT_GREY / 255)).collect(), c))
        })
        .collect()
}

/// What is compared of a shade: a pixel of 15 bits has no more than its highest five bits.
fn shade(grey: u32) -> u8 {
    grey as u8 >> 4
}

/// Reads a binary PPM (netpbm's ppm(5)) of 8-bit colours as text in the console's font.
fn read_pixels(file: &[u8], glyphs: &HashMap<Vec<u8>, char>) -> Result<Vec<String>> {
    let mut header = file.splitn(4, |byte| byte.is_ascii_whitespace());
    let mut word = || header.next().and_then(|word| std::str::from_utf8(word).ok()).context("no PPM");
    ensure!(word()? == "P6", "no PPM");
    let (width, height): (usize, usize) = (word()?.parse()?, word()?.parse()?);
    let pixels = &file[file.len().checked_sub(width * height * 3).context("a PPM that is cut off")?..];
    let (columns, rows) = (get_raster_width(FontWeight::Regular, RasterHeight::Size16), 16);
    let cell = |row: usize, column: usize| {
        let at = |y: usize, x: usize| {
            shade(u32::from(pixels[((row * rows + y) * width + column * columns + x) * 3 + 1]))
        };
        let shown: Vec<u8> = (0..rows).flat_map(|y| (0..columns).map(move |x| at(y, x))).collect();
        glyphs.get(&shown).copied().unwrap_or(UNKNOWN)
    };
    let line = |row| (0..width / columns).map(|column| cell(row, column)).collect::<String>();
    Ok((0..height / rows).map(|row| line(row).trim_end().to_owned()).collect())
}

/// Text mode's memory: 80 characters in a row, each with its attribute behind it.
fn text_lines(memory: &[u8]) -> Vec<String> {
    let line = |row: &[u8]| row.chunks(2).map(|cell| char::from(cell[0])).collect::<String>();
    memory.chunks(160).map(|row| line(row).trim_end_matches([' ', '\0']).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_become_text() {
        let text = "Umbra ~ 0O";
        let width = 7 * text.len();
        let mut image = format!("P6\n{width} 16\n255\n").into_bytes();
        let by_char: HashMap<char, Vec<u8>> = glyphs().into_iter().map(|(glyph, c)| (c, glyph)).collect();
        for y in 0..16 {
            for c in text.chars() {
                image.extend(by_char[&c][y * 7..y * 7 + 7].iter().flat_map(|&shade| [shade << 4; 3]));
            }
        }
        assert_eq!(read_pixels(&image, &glyphs()).unwrap(), [text]);
        assert!(read_pixels(&image[..500], &glyphs()).is_err());
        let last = image.len() - 3 * 3;
        image[last - 2 * 3 * width..].fill(0xff);
        assert!(read_pixels(&image, &glyphs()).unwrap()[0].contains(UNKNOWN));
    }

    #[test]
    fn text_memory_becomes_text() {
        let mut memory: Vec<u8> = "hello".bytes().flat_map(|byte| [byte, 7]).collect();
        memory.resize(320, 0);
        assert_eq!(text_lines(&memory), ["hello", ""]);
    }

    #[test]
    fn glyphs_differ() {
        assert_eq!(glyphs().len(), 95);
    }
}
