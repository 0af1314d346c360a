//! What the host does to the memory of an L1.
use mmu::{Gfn, GfnRange, LogBy, Sweep, ZapProgress};

use super::super::machines::Machine as Host;
use super::ram::slot;
use super::{exclusive, World, CPU};

impl<H: Host> World<H> {
    /// Begins the log of the first slot, in both kinds.
    pub fn start_log(&mut self, by: LogBy) {
        let mut sweep = self.exclusive().start_dirty_log(Gfn::default(), by).unwrap();
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let _ = self.kind.rearm(&mut self.exclusive(), &sweep, &mut progress);
        }
        while !sweep.is_done() {
            let _ = self.direct.rearm(&self.memory.shared(CPU), &mut sweep).issue();
        }
        self.check();
    }

    pub fn logs(&self) -> bool {
        self.memory.shared(CPU).dirty_log(Gfn::default()).is_some()
    }

    pub fn stop_log(&mut self) {
        let range = self.exclusive().stop_dirty_log(Gfn::default()).unwrap().range();
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let _ = self.kind.collapse(&mut self.exclusive(), range, &mut progress);
        }
        self.check();
    }

    /// The frames that the log has, and takes them out.
    pub fn harvest(&mut self) -> Vec<u64> {
        let all = slot(0).range;
        let mut sweep = Sweep::over(all);
        while !sweep.is_done() {
            let _ = self.direct.collect_dirty(&self.memory.shared(CPU), &mut sweep).issue();
        }
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let _ = self.kind.collect_dirty(&mut self.exclusive(), all, &mut progress);
        }
        let mut found = vec![];
        for index in 0..all.pages() / 64 {
            let first = Gfn::new_truncate(index * 64);
            let mask = {
                let shared = self.memory.shared(CPU);
                let mask = shared.dirty_log(Gfn::default()).unwrap().clear(index as usize, u64::MAX);
                let _ = self.direct.rearm_pages(&shared, first, mask).issue();
                mask
            };
            let _ = self.kind.rearm_pages(&mut self.exclusive(), first, mask);
            found.extend((0..64).filter(|bit| mask >> bit & 1 != 0).map(|bit| index * 64 + bit));
        }
        self.check();
        found
    }

    pub fn zap(&mut self, range: GfnRange) {
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let _ = self.kind.zap(&mut exclusive(self.memory, self.direct), range, &mut progress);
        }
        let mut sweep = Sweep::over(range);
        while !sweep.is_done() {
            let _ = self.direct.zap(&self.memory.shared(CPU), &mut sweep).issue();
        }
        self.check();
    }

    /// The host moves a frame.
    pub fn move_frame(&mut self, gfn: u64) {
        let range = GfnRange::of(Gfn::new_truncate(gfn));
        let invalidation = self.exclusive().begin_invalidation(range);
        self.zap(range);
        *self.memory.backing().moves.lock().unwrap().entry(gfn).or_default() += 1;
        drop(invalidation);
    }

    /// Takes a slot away, or puts it back.
    pub fn toggle_slot(&mut self, index: usize) {
        let slot = slot(index);
        if self.present[index] {
            let mut guard = exclusive(self.memory, self.direct);
            let mut sweep = guard.remove_slot(Gfn::new_truncate(slot.range.start())).unwrap();
            while !sweep.is_done() {
                let _ = self.direct.zap(&guard, &mut sweep).issue();
            }
            let mut progress = ZapProgress::default();
            while !progress.is_done() {
                let _ = self.kind.zap(&mut guard, slot.range, &mut progress);
            }
        } else {
            self.memory.exclusive(CPU).insert_slot(&slot).unwrap();
        }
        self.present[index] ^= true;
        self.remember();
        self.check();
    }

    pub fn obsolete(&mut self) {
        let root = self.tables.allocate();
        match self.direct.invalidate_all(&mut exclusive(self.memory, self.direct), root) {
            Ok(flush) => drop(flush.issue()),
            Err(root) => self.tables.release(root),
        }
    }

    pub fn zap_obsolete(&mut self) {
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let _ = self.kind.zap_obsolete(&mut exclusive(self.memory, self.direct), &mut progress);
        }
        let mut sweep = Sweep::over(GfnRange::ALL);
        while !sweep.is_done() {
            let _ = self.direct.zap_obsolete(&self.memory.shared(CPU), &mut sweep).issue();
        }
        self.check();
    }
}
