//! Changes what Umbra's Multiboot2 header asks the loader for, in a copy of its file.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The framebuffer tag as `boot`'s entry stub has it: type, flags, size (Multiboot2 specification, section 3.1.10); width,
/// height and depth follow.
const TAG: [u8; 8] = [5, 0, 1, 0, 20, 0, 0, 0];

/// What the header asks for in place of the usual mode.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// A framebuffer with so many bits a pixel.
    Depth(u32),
    /// No framebuffer, so text mode.
    Text,
}

/// Copies Umbra's file `from` to `to` and changes it there.
pub(crate) fn patch(from: &Path, to: PathBuf, wanted: Wanted) -> Result<PathBuf> {
    let mut file = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    change(&mut file, wanted)?;
    fs::write(&to, file)?;
    Ok(to)
}

fn change(file: &mut [u8], wanted: Wanted) -> Result<()> {
    let at =
        file.windows(TAG.len()).position(|bytes| bytes == TAG).context("no framebuffer tag in the header")?;
    match wanted {
        Wanted::Depth(bits) => file[at + 16..at + 20].copy_from_slice(&bits.to_le_bytes()),
        // A tag that no loader knows, and that is optional.
        Wanted::Text => file[at..at + 2].copy_from_slice(&0x7fff_u16.to_le_bytes()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tag_changes() {
        let mut file = vec![0; 64];
        file[24..32].copy_from_slice(&TAG);
        file[40] = 32;
        change(&mut file, Wanted::Depth(15)).unwrap();
        assert_eq!((file[40], file.iter().filter(|byte| **byte != 0).count()), (15, 4));
        change(&mut file, Wanted::Text).unwrap();
        assert_eq!(file[24..26], [0xff, 0x7f]);
        assert!(change(&mut file, Wanted::Text).is_err());
    }
}
