//! Reads page tables as the processor does and looks for mappings that are both writable and executable.

use super::entry::{Entry, ENTRIES};
use super::table::{page_bytes, TableFrames, LEVELS};

/// What an audit found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Mapped pages of any size.
    pub mappings: u64,
    /// The first page that is both writable and executable.
    pub writable_executable: Option<u64>,
    /// The first page that user mode may touch.
    pub user: Option<u64>,
}

/// Walks the tables under `root`. Rights are those of all levels together (AMD APM vol. 2 section 5.6.1).
pub fn audit(frames: &impl TableFrames, root: u64) -> Audit {
    let mut audit = Audit::default();
    walk(frames, root, LEVELS, 0, Rights { write: true, execute: true, user: true }, &mut audit);
    audit
}

#[derive(Clone, Copy)]
struct Rights {
    write: bool,
    execute: bool,
    user: bool,
}

impl Rights {
    fn and(self, entry: Entry) -> Self {
        Self {
            write: self.write && entry.allows_write(),
            execute: self.execute && entry.allows_execute(),
            user: self.user && entry.allows_user(),
        }
    }
}

fn walk(frames: &impl TableFrames, table: u64, level: u32, base: u64, rights: Rights, audit: &mut Audit) {
    for index in 0..ENTRIES {
        let entry = frames.load(table, index);
        if !entry.is_present() {
            continue;
        }
        let virt = canonical(base + index as u64 * page_bytes(level));
        let rights = rights.and(entry);
        if !entry.is_page(level) {
            walk(frames, entry.addr(level), level - 1, virt, rights, audit);
            continue;
        }
        audit.mappings += 1;
        if rights.write && rights.execute {
            audit.writable_executable.get_or_insert(virt);
        }
        if rights.user {
            audit.user.get_or_insert(virt);
        }
    }
}

fn canonical(virt: u64) -> u64 {
    ((virt << 16) as i64 >> 16) as u64
}

#[cfg(test)]
mod tests {
    use super::super::entry::{Access, Attributes};
    use super::super::table::tests::Fake;
    use super::super::table::{index_of, PageTables};
    use super::*;

    const PHYSMAP: u64 = 0xffff_8000_0000_0000;

    fn tables() -> (Fake, PageTables) {
        let mut fake = Fake::default();
        let tables = PageTables::new(&mut fake, true).unwrap();
        tables.map(&mut fake, 0x20_0000, 0x20_0000, 0x3000, Attributes::memory(Access::ReadExecute)).unwrap();
        tables.map(&mut fake, PHYSMAP, 0, 3 << 30, Attributes::memory(Access::ReadWrite)).unwrap();
        (fake, tables)
    }

    /// Sets and clears bits of the entry of `level` that `virt` uses.
    fn poke(fake: &mut Fake, root: u64, virt: u64, level: u32, set: u64, clear: u64) {
        let mut table = root;
        for l in (level + 1..=LEVELS).rev() {
            table = fake.load(table, index_of(virt, l)).addr(l);
        }
        let index = index_of(virt, level);
        let entry = fake.load(table, index);
        fake.store(table, index, Entry(entry.0 & !clear | set));
    }

    #[test]
    fn good_tables_pass() {
        let (fake, tables) = tables();
        assert_eq!(audit(&fake, tables.root()), Audit { mappings: 6, writable_executable: None, user: None });
    }

    #[test]
    fn a_writable_executable_page_is_found() {
        let (mut fake, tables) = tables();
        poke(&mut fake, tables.root(), 0x20_1000, 1, 1 << 1, 0);
        assert_eq!(audit(&fake, tables.root()).writable_executable, Some(0x20_1000));
        let (mut fake, tables) = self::tables();
        poke(&mut fake, tables.root(), PHYSMAP + (2 << 30), 3, 0, 1 << 63);
        assert_eq!(audit(&fake, tables.root()).writable_executable, Some(PHYSMAP + (2 << 30)));
    }

    #[test]
    fn upper_levels_take_rights_away() {
        let (mut fake, tables) = tables();
        poke(&mut fake, tables.root(), 0x20_1000, 1, 1 << 1, 0);
        poke(&mut fake, tables.root(), 0x20_1000, 3, 1 << 63, 0);
        assert_eq!(audit(&fake, tables.root()).writable_executable, None);
    }

    #[test]
    fn user_pages_are_found() {
        let (mut fake, tables) = tables();
        poke(&mut fake, tables.root(), 0x20_0000, 1, 1 << 2, 0);
        assert_eq!(audit(&fake, tables.root()).user, None, "the upper levels are supervisor only");
        for level in 2..=4 {
            poke(&mut fake, tables.root(), 0x20_0000, level, 1 << 2, 0);
        }
        assert_eq!(audit(&fake, tables.root()).user, Some(0x20_0000));
    }
}
