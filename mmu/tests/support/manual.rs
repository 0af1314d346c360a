//! Reference walk of a guest's tables, as slow and as close to the manuals as possible (Intel SDM vol. 3, 4.3 to 4.7; AMD
//! APM vol. 2, 5.2 to 5.6). Shares nothing with the crate.
pub mod ept;
pub mod ept_guest;
pub mod guest;
pub mod nested;

#[derive(Clone, Copy, Debug, Default)]
pub struct Machine {
    pub pg: bool,
    pub wp: bool,
    pub pse: bool,
    pub pae: bool,
    pub la57: bool,
    pub smep: bool,
    pub smap: bool,
    pub pke: bool,
    pub pks: bool,
    pub lma: bool,
    pub nxe: bool,
    pub maxphyaddr: u32,
    pub gib_pages: bool,
    pub pse36: bool,
    pub amd: bool,
    pub cr3: u64,
    pub ac: bool,
    pub pkru: u32,
    pub pkrs: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    Read,
    Write,
    Fetch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    User,
    Supervisor,
    Implicit,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Reached {
    pub address: u64,
    pub page_bytes: u64,
    /// Entries that change, with the value they get, in the order of the walk.
    pub marks: Vec<(u64, u64)>,
    /// What the entries permit together.
    pub rights: Rights,
}

/// Rights of a linear address (of others, all).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
}

impl Rights {
    pub const ALL: Self = Self { writable: true, user: true, executable: true };
}

struct Step {
    at: u64,
    entry: u64,
    writable: bool,
    user: bool,
    executable: bool,
    has_accessed_bit: bool,
}

/// Where `va` leads, or the error code of the page fault. `word` reads the aligned 8 bytes that an entry's address is
/// in, `None` outside RAM, which counts as not present.
pub fn walk(
    m: &Machine,
    word: &dyn Fn(u64) -> Option<u64>,
    va: u64,
    what: What,
    who: Who,
) -> Result<Reached, u32> {
    let user = who == Who::User;
    let mut code = 0;
    if what == What::Write {
        code |= 2;
    }
    if user {
        code |= 4;
    }
    // Intel SDM vol. 3, 4.7: with CR4.PAE and EFER.NXE both, or with SMEP.
    if what == What::Fetch && m.pg && (m.nxe && (m.pae || m.lma) || m.smep) {
        code |= 16;
    }
    if !m.pg {
        return Ok(Reached {
            address: va & 0xffff_ffff,
            page_bytes: 1 << 32,
            marks: vec![],
            rights: Rights::ALL,
        });
    }
    let entry_bytes = if m.lma || m.pae { 8 } else { 4 };
    // (shift of the index, number of index bits) from the top.
    let levels: &[(u32, u32)] = if m.lma && m.la57 {
        &[(48, 9), (39, 9), (30, 9), (21, 9), (12, 9)]
    } else if m.lma {
        &[(39, 9), (30, 9), (21, 9), (12, 9)]
    } else if m.pae {
        &[(30, 2), (21, 9), (12, 9)]
    } else {
        &[(22, 10), (12, 10)]
    };
    let va = if m.lma { va } else { va & 0xffff_ffff };
    let mut table = if m.lma {
        m.cr3 & 0x000f_ffff_ffff_f000
    } else if m.pae {
        m.cr3 & 0xffff_ffe0
    } else {
        m.cr3 & 0xffff_f000
    };
    let mut steps: Vec<Step> = Vec::new();
    let mut reached = None;
    for &(shift, index_bits) in levels {
        let index = (va >> shift) & ((1 << index_bits) - 1);
        let at = table + index * entry_bytes;
        let Some(bytes) = word(at) else { return Err(code) };
        let entry = if entry_bytes == 8 { bytes } else { (bytes >> ((at & 4) * 8)) & 0xffff_ffff };
        if entry & 1 == 0 {
            return Err(code);
        }
        let pae_pdpte = !m.lma && m.pae && shift == 30;
        let ps = entry >> 7 & 1 == 1;
        let large = match shift {
            22 => ps && m.pse,
            21 => ps,
            30 => ps && m.lma && m.gib_pages,
            _ => false,
        };
        if reserved_bit_set(m, entry, entry_bytes, shift, large, pae_pdpte) {
            return Err(code | 1 | 8);
        }
        steps.push(Step {
            at,
            entry,
            writable: pae_pdpte || entry >> 1 & 1 == 1,
            user: pae_pdpte || entry >> 2 & 1 == 1,
            executable: entry_bytes == 4 || !m.nxe || entry >> 63 == 0,
            has_accessed_bit: !pae_pdpte,
        });
        if large || shift == 12 {
            let inside = (1u64 << shift) - 1;
            let mut frame = entry & 0x000f_ffff_ffff_f000 & !inside;
            if shift == 22 && m.pse36 {
                frame |= (entry >> 13 & 0xff) << 32;
            }
            reached = Some((frame | va & inside, inside + 1));
            break;
        }
        table = entry & if entry_bytes == 8 { 0x000f_ffff_ffff_f000 } else { 0xffff_f000 };
    }
    let (address, page_bytes) = reached.expect("the last level is a leaf");
    let leaf = steps.last().unwrap();

    let writable = steps.iter().all(|step| step.writable);
    let user_page = steps.iter().all(|step| step.user);
    let executable = steps.iter().all(|step| step.executable);
    // SDM 4.6.1, sentence by sentence.
    let allowed = if user {
        match what {
            What::Read => user_page,
            What::Write => user_page && writable,
            What::Fetch => user_page && executable,
        }
    } else if user_page {
        let smap_permits = !m.smap || (m.ac && who != Who::Implicit);
        match what {
            What::Read => smap_permits,
            What::Write => smap_permits && (writable || !m.wp),
            What::Fetch => executable && !m.smep,
        }
    } else {
        match what {
            What::Read => true,
            What::Write => writable || !m.wp,
            What::Fetch => executable,
        }
    };
    // SDM 4.6.2: user-mode addresses have PKRU, supervisor-mode addresses IA32_PKRS.
    let mut key_denies = false;
    let (keys_on, key_rights) = if user_page { (m.pke, m.pkru) } else { (m.pks, m.pkrs) };
    if m.lma && keys_on && what != What::Fetch {
        let key = (leaf.entry >> 59 & 15) as u32;
        let access_disabled = key_rights >> (2 * key) & 1 == 1;
        let write_disabled = key_rights >> (2 * key + 1) & 1 == 1;
        key_denies = access_disabled || (what == What::Write && write_disabled && (user || m.wp));
    }
    if !allowed || key_denies {
        return Err(code | 1 | if key_denies { 32 } else { 0 });
    }
    let mut marks = Vec::new();
    for (position, step) in steps.iter().enumerate() {
        let mut marked = step.entry;
        if step.has_accessed_bit {
            marked |= 1 << 5;
        }
        if position + 1 == steps.len() && what == What::Write {
            marked |= 1 << 6;
        }
        if marked != step.entry {
            marks.push((step.at, marked));
        }
    }
    let rights = Rights { writable, user: user_page, executable };
    Ok(Reached { address, page_bytes, marks, rights })
}

fn reserved_bit_set(
    m: &Machine,
    entry: u64,
    entry_bytes: u64,
    shift: u32,
    large: bool,
    pae_pdpte: bool,
) -> bool {
    let set = |low: u32, high: u32| (low..=high).any(|bit| entry >> bit & 1 == 1);
    if entry_bytes == 4 {
        if !large {
            return false;
        }
        return if m.pse36 {
            // Table 4-4: bits (M-20):13 are address bits, bits 21:(M-19) reserved, M = min(40, MAXPHYADDR).
            let width = m.maxphyaddr.min(40);
            set(width - 19, 21)
        } else {
            set(13, 21)
        };
    }
    if m.maxphyaddr < 52 && set(m.maxphyaddr, 51) {
        return true;
    }
    if pae_pdpte {
        // The manuals reserve bit 5, too; QEMU's TCG sets it by itself and so it has to be let through.
        return set(1, 2) || set(6, 8) || set(52, 63);
    }
    if !m.nxe && set(63, 63) {
        return true;
    }
    if !m.lma && set(52, 62) {
        return true;
    }
    let ps = set(7, 7);
    match shift {
        48 | 39 => ps || (m.amd && set(8, 8)),
        30 if ps && !m.gib_pages => true,
        30 if large => set(13, 29),
        21 if large => set(13, 20),
        _ => false,
    }
}
