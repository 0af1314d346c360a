//! Reference walk of extended page tables, as slow and as close to the manual as possible (Intel SDM vol. 3, 29.3.2, 29.3.3
//! and 29.3.5). Shares nothing with the crate.
use super::{Reached, Rights};

/// What L1 has, and the controls it runs L2 with.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    pub levels: u32,
    pub execute_only: bool,
    pub mode_based: bool,
    pub accessed_dirty: bool,
    pub mib_pages: bool,
    pub gib_pages: bool,
    pub maxphyaddr: u32,
    pub root: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    /// Through a linear address that is a user's, or not.
    Fetch {
        user: bool,
    },
}

pub const OPS: [Op; 4] = [Op::Read, Op::Write, Op::Fetch { user: false }, Op::Fetch { user: true }];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// With bits 6:3 of the exit qualification, where they belong.
    Violation(u64),
    Misconfiguration,
}

/// Where `gpa` leads. `word` reads the aligned 8 bytes at an address, `None` outside RAM, which counts as not present.
pub fn walk(m: &Machine, word: &dyn Fn(u64) -> Option<u64>, gpa: u64, op: Op) -> Result<Reached, Failed> {
    let mut rights = [true; 4];
    if m.levels == 4 && gpa >= 1 << 48 {
        return Err(Failed::Violation(0));
    }
    let mut table = m.root & 0x000f_ffff_ffff_f000;
    let mut steps: Vec<(u64, u64)> = vec![];
    let mut level = m.levels;
    let (address, page_bytes) = loop {
        let shift = 12 + 9 * (level - 1);
        let at = table + ((gpa >> shift) & 511) * 8;
        let Some(entry) = word(at) else { return Err(Failed::Violation(0)) };
        let bit = |position: u32| entry >> position & 1 == 1;
        let any = |low: u32, high: u32| (low..=high).any(bit);
        // Bit 10 has a meaning only with mode-based execute control.
        let here = [bit(0), bit(1), bit(2), m.mode_based && bit(10)];
        for (all, here) in rights.iter_mut().zip(here) {
            *all &= here;
        }
        if here == [false; 4] {
            return Err(Failed::Violation(0));
        }
        let leaf = level == 1 || (matches!(level, 2 | 3) && bit(7));
        let mut wrong = bit(1) && !bit(0);
        wrong |= !bit(0) && (here[2] || here[3]) && !m.execute_only;
        wrong |= m.maxphyaddr < 52 && any(m.maxphyaddr, 51);
        if leaf {
            wrong |= matches!(entry >> 3 & 7, 2 | 3 | 7);
            wrong |= level == 2 && (!m.mib_pages || any(12, 20));
            wrong |= level == 3 && (!m.gib_pages || any(12, 29));
        } else {
            wrong |= any(3, 6) || (level >= 4 && bit(7));
        }
        if wrong {
            return Err(Failed::Misconfiguration);
        }
        steps.push((at, entry));
        if leaf {
            let inside = (1u64 << shift) - 1;
            break (entry & 0x000f_ffff_ffff_f000 & !inside | gpa & inside, inside + 1);
        }
        table = entry & 0x000f_ffff_ffff_f000;
        level -= 1;
    };
    let allowed = match op {
        Op::Read => rights[0],
        Op::Write => rights[1],
        Op::Fetch { user } if m.mode_based && user => rights[3],
        Op::Fetch { .. } => rights[2],
    };
    if !allowed {
        let bits = rights.iter().enumerate().map(|(position, &right)| u64::from(right) << (3 + position));
        return Err(Failed::Violation(bits.sum()));
    }
    let mut marks = vec![];
    let last = steps.len() - 1;
    for (position, &(at, entry)) in steps.iter().enumerate() {
        let mut marked = entry;
        if m.accessed_dirty {
            marked |= 1 << 8;
            if position == last && op == Op::Write {
                marked |= 1 << 9;
            }
        }
        if marked != entry {
            marks.push((at, marked));
        }
    }
    Ok(Reached { address, page_bytes, marks, rights: Rights::ALL })
}
