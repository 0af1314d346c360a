//! The Multiboot 1 information block, copied to safety before low memory is used for anything else.
use crate::cpu::peek;
use crate::entry::MULTIBOOT_MAGIC;
use crate::Racy;

/// One range of the memory map. Multiboot specification 0.6.96, 3.3.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// 1 is RAM, all else is not.
    pub kind: u32,
}

/// One module.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    line: Text<128>,
}

impl Module {
    /// The module's string.
    pub fn line(&self) -> &str {
        self.line.as_str()
    }
}

/// What the loader said.
#[derive(Debug)]
pub struct Boot {
    /// EAX at entry.
    pub magic: u32,
    /// Physical address of the information block.
    pub info: u32,
    /// The `flags` word.
    pub flags: u32,
    /// KiB below 1 MiB and KiB above it, when flag 0 is set.
    pub mem: (u32, u32),
    ranges: [Range; 32],
    range_count: usize,
    modules: [Module; 8],
    module_count: usize,
    line: Text<1024>,
}

impl Boot {
    /// The memory map.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges[..self.range_count]
    }

    /// The modules.
    pub fn modules(&self) -> &[Module] {
        &self.modules[..self.module_count]
    }

    /// The command line.
    pub fn command_line(&self) -> &str {
        self.line.as_str()
    }

    /// Whether the command line has `word`.
    pub fn word(&self, word: &str) -> bool {
        self.command_line().split_ascii_whitespace().any(|each| each == word)
    }

    /// The value of `key=value` on the command line.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.command_line()
            .split_ascii_whitespace()
            .find_map(|each| each.strip_prefix(key)?.strip_prefix('='))
    }
}

#[derive(Clone, Copy, Debug)]
struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Text<N> {
    const EMPTY: Text<N> = Text { bytes: [0; N], len: 0 };

    fn copy(address: u32) -> Text<N> {
        let mut text = Text::EMPTY;
        while text.len < N {
            let byte: u8 = peek(u64::from(address) + text.len as u64);
            if byte == 0 {
                break;
            }
            text.bytes[text.len] = byte;
            text.len += 1;
        }
        text
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

const NO_MODULE: Module = Module { start: 0, end: 0, line: Text::EMPTY };

static BOOT: Racy<Boot> = Racy::new(Boot {
    magic: 0,
    info: 0,
    flags: 0,
    mem: (0, 0),
    ranges: [Range { start: 0, len: 0, kind: 0 }; 32],
    range_count: 0,
    modules: [NO_MODULE; 8],
    module_count: 0,
    line: Text::EMPTY,
});

/// What the loader said.
pub fn boot() -> &'static Boot {
    // SAFETY: written once by `init`, before anything else runs.
    unsafe { &*BOOT.get() }
}

/// Copies the information block.
pub fn init(magic: u32, info: u32) -> &'static Boot {
    // SAFETY: the first thing that runs; nobody else holds a reference yet.
    let boot = unsafe { &mut *BOOT.get() };
    boot.magic = magic;
    boot.info = info;
    if magic != MULTIBOOT_MAGIC {
        return boot;
    }
    let field = |offset: u32| peek::<u32>(u64::from(info) + u64::from(offset));
    boot.flags = field(0);
    if boot.flags & 1 != 0 {
        boot.mem = (field(4), field(8));
    }
    if boot.flags & 1 << 2 != 0 {
        boot.line = Text::copy(field(16));
    }
    if boot.flags & 1 << 3 != 0 {
        let table = u64::from(field(24));
        for index in 0..(field(20) as usize).min(boot.modules.len()) {
            let entry = table + 16 * index as u64;
            boot.modules[index] = Module {
                start: peek::<u32>(entry).into(),
                end: peek::<u32>(entry + 4).into(),
                line: Text::copy(peek(entry + 8)),
            };
            boot.module_count = index + 1;
        }
    }
    if boot.flags & 1 << 6 != 0 {
        let (mut at, end) = (field(48), field(48).saturating_add(field(44)));
        while at < end && boot.range_count < boot.ranges.len() {
            let entry = u64::from(at);
            boot.ranges[boot.range_count] =
                Range { start: peek(entry + 4), len: peek(entry + 12), kind: peek(entry + 20) };
            boot.range_count += 1;
            at = at.saturating_add(peek::<u32>(entry).saturating_add(4));
        }
    }
    boot
}
