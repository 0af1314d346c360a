//! What a vCPU needs while it runs: its role, its roots, and whether its TLB tag is behind.
mod carry;
mod events;
mod key;
mod near;
mod nested;
mod requests;
mod roots;
mod seen;
mod wp;

pub use events::{BadInvpcid, Invpcid};
pub use key::{GuestTag, PagingState, RootKey};
pub use nested::{Running, VcpuMmus, Walk};
pub use requests::{Requests, RootSet, Sync, TagFlush};

use crate::addr::Gva;
use crate::cpu::CpuId;
use crate::kind::Root;
use crate::level::Level;
use crate::memory::{Generation, Seat, VmMemory};
use crate::mutant::{self, FlushSite, Mutant};
use crate::role::{CpuRole, GuestCpu, RoleFlags, RootRole, VcpuMode};
use roots::{Cached, RootCache};
use wp::Unprotected;

/// What a TLB tag of the hardware holds.
#[derive(Clone, Copy, Debug)]
struct Tag {
    /// Generation up to which the tag is current.
    flushed: Generation,
    /// CPU whose TLB has the tag; `None` if the tag may hold anything.
    cpu: Option<CpuId>,
}

impl Tag {
    /// A tag that may hold anything.
    const UNKNOWN: Self = Self { flushed: Generation(0), cpu: None };
}

/// How the vCPU's hardware tags (ASIDs or VPIDs) are spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tags {
    /// One for all roots: a switch of roots flushes it.
    One,
    /// One for each root that is kept ([`Mmu::slot`]): a switch of roots flushes nothing.
    PerRoot,
}

/// Which kind serves the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serves {
    /// A root for each [`VcpuMode`], whatever the guest's tables are.
    Direct { level: Level },
    /// A shadow of the guest's own tables, or of L1's nested tables.
    Shadow { host: Level, accessed_dirty: bool },
}

/// The run state of one vCPU with one kind: the sketch's `root_mmu`, and its `tdp12_mmu`.
///
/// It keeps the root it runs on and the three before, whatever kind they are of, found by everything that decides
/// what a root says ([`RootKey`]). Whatever happens to the vCPU is a method that says what follows from it
/// ([`Requests`]); what must be done before the next [`enter`](Self::enter) is remembered here, as is what makes the
/// content of its TLB tag wrong: a switch of roots, another physical CPU, a flush generation.
#[derive(Debug)]
pub struct Mmu {
    /// What is entered on: [`Root::NONE`] while there is work.
    root: Root,
    tag: Tag,
    role: CpuRole,
    serves: Serves,
    tags: Tags,
    mode: VcpuMode,
    /// L1's name for who runs.
    context: u16,
    state: PagingState,
    guest_cpu: GuestCpu,
    /// Of L1's nested tables, which key they have.
    nested: Option<RootKey>,
    roots: RootCache,
    /// How CR0.WP was cleared last.
    unprotected: Unprotected,
    /// Address that must go from the tag, if nothing else must.
    address: Option<(CpuId, Gva)>,
}

impl Mmu {
    /// A vCPU that will run on `root` of a direct kind, with a tag that may hold anything.
    pub fn new(role: CpuRole, root: Root) -> Self {
        let flags = role.flags();
        let guest_cpu = GuestCpu {
            max_phys_addr: role.max_phys_addr() as u8,
            gib_pages: flags.contains(RoleFlags::GIB_PAGES),
            pse36: flags.contains(RoleFlags::PSE36),
            amd: flags.contains(RoleFlags::AMD),
        };
        Self::direct(PagingState::RESET, guest_cpu, root).with_role(role)
    }

    /// The same, for a vCPU with these registers and CPUID.
    pub fn direct(state: PagingState, cpu: GuestCpu, root: Root) -> Self {
        let mut mmu = Self::unloaded(state, cpu, Serves::Direct { level: root.level }, Tags::One);
        let _ = mmu.set_root(root);
        mmu
    }

    /// A vCPU whose own tables are shadowed; it has no root yet. `host` and `accessed_dirty` are as for
    /// [`RootRole::shadow`].
    pub fn shadow(state: PagingState, cpu: GuestCpu, host: Level, accessed_dirty: bool, tags: Tags) -> Self {
        Self::unloaded(state, cpu, Serves::Shadow { host, accessed_dirty }, tags)
    }

    fn unloaded(state: PagingState, guest_cpu: GuestCpu, serves: Serves, tags: Tags) -> Self {
        Self {
            root: Root::NONE,
            tag: Tag::UNKNOWN,
            role: CpuRole::new(&state.regs, &guest_cpu),
            serves,
            tags,
            mode: VcpuMode { smm: state.smm, nested: false },
            context: 0,
            state,
            guest_cpu,
            nested: None,
            roots: RootCache::EMPTY,
            unprotected: Unprotected::default(),
            address: None,
        }
    }

    fn with_role(self, role: CpuRole) -> Self {
        Self { role, ..self }
    }

    /// Whether the vCPU's own tables, or L1's, are shadowed; if not, the processor does what the events tell of by
    /// itself.
    #[inline]
    pub const fn is_shadow(&self) -> bool {
        matches!(self.serves, Serves::Shadow { .. })
    }

    /// The role, as last set.
    #[inline]
    pub const fn role(&self) -> CpuRole {
        self.role
    }

    /// The registers, as last set.
    #[inline]
    pub const fn state(&self) -> &PagingState {
        &self.state
    }

    /// The role of the root that the vCPU runs on.
    pub fn root_role(&self) -> RootRole {
        self.key_of_now().role()
    }

    /// Says that the registers make another role now. The direct kind has one root for all roles, so this is an
    /// assignment; the tag stays as it is.
    #[inline]
    pub fn set_role(&mut self, role: CpuRole) {
        self.role = role;
    }

    /// The root the vCPU runs on; one that nothing accepts while there is work to [`carry_out`](Self::carry_out).
    #[inline]
    pub const fn root(&self) -> Root {
        self.root
    }

    /// Switches to `root` of the direct kind, of which the caller holds the share. A flush that follows is also
    /// remembered until the next entry.
    pub fn set_root(&mut self, root: Root) -> TagFlush {
        if root == self.root {
            return TagFlush::None;
        }
        let key = self.key_of_now();
        // It takes the place of the one with the same key, if that is not another's to give back.
        let _ = self.roots.take(|cached| !cached.held);
        if self.roots.is_full() {
            return self.flush();
        }
        let slot = self.roots.free_slot();
        self.roots.push(Cached::new(key, root, false, slot));
        let flush = self.run_on();
        self.settle_root();
        flush
    }

    /// The tag must be flushed at the next entry: the guest asked for it, or the tag was another vCPU's before.
    /// With a tag for each root, all of them.
    pub fn flush(&mut self) -> TagFlush {
        for cached in self.roots.iter_mut() {
            cached.tag = Tag::UNKNOWN;
        }
        self.flush_current()
    }

    /// The translations of `address` must go from the tag at the next entry: for a guest whose translations are the
    /// hardware's alone, like L2 on nested tables (INVLPGA, INVVPID of type 0).
    pub fn flush_address(&mut self, address: Gva) -> TagFlush {
        match (self.tag.cpu, self.address) {
            (Some(cpu), None) => {
                // Found by the slow path of the entry.
                self.tag.cpu = None;
                self.address = Some((cpu, address));
                TagFlush::Address(address)
            }
            (None, Some((_, same))) if same == address => TagFlush::Address(address),
            _ => self.flush_current(),
        }
    }

    /// Begins to run the vCPU on `cpu`, interrupts off, no guard held. The returned value says whether to flush the tag
    /// on the way in, and is kept until the vCPU has exited.
    ///
    /// From here on whoever takes a translation away finds this CPU in the guest and kicks it.
    #[inline]
    pub fn enter<'m, B>(&mut self, memory: &'m VmMemory<B>, cpu: CpuId) -> Entered<'m> {
        let (generation, seat) = memory.shootdown().enter_guest(cpu);
        // After the seat was taken, as for the flush: either this sees that the roots are obsolete, or whoever made them
        // so sees this CPU in the guest.
        if self.root.generation() != memory.root_generation() && !mutant::is(Mutant::ObsoleteEntered) {
            // The flush stays due: this entry comes to nothing.
            return Entered { seat, root: self.root, flush: TagFlush::All, obsolete: true };
        }
        let same = self.tag.cpu == Some(cpu) || self.tag.cpu.is_some() && mutant::is(Mutant::TagOfOtherCpu);
        let current = same && (self.tag.flushed >= generation || mutant::is(Mutant::FlushOnlyRunning));
        let flush = if current { TagFlush::None } else { self.due(cpu, generation) };
        self.tag = Tag { flushed: generation, cpu: Some(cpu) };
        Entered { seat, root: self.root, flush, obsolete: false }
    }

    #[cold]
    fn due(&mut self, on: CpuId, generation: Generation) -> TagFlush {
        match self.address.take() {
            Some((cpu, address))
                if cpu == on && (self.tag.flushed >= generation || mutant::is(Mutant::DueAddressOnly)) =>
            {
                TagFlush::Address(address)
            }
            _ => TagFlush::All,
        }
    }

    /// The number of the hardware tag that the current root has: below four, and zero if there is one for all.
    pub fn slot(&self) -> u8 {
        match self.tags {
            Tags::One => 0,
            Tags::PerRoot => self.roots.current().map_or(0, |cached| cached.slot),
        }
    }

    /// The key that follows from what the vCPU is now.
    fn key_of_now(&self) -> RootKey {
        match (self.serves, self.nested) {
            (Serves::Direct { level }, _) => {
                RootKey::new(RootRole::direct(level, self.mode, true), 0, [0; 4], GuestTag::default())
            }
            (_, Some(key)) => key,
            (Serves::Shadow { host, accessed_dirty }, None) => {
                let role = RootRole::shadow(self.role, host, self.mode, accessed_dirty);
                let tag = GuestTag { context: self.context, pcid: self.state.pcid() };
                RootKey::new(role, self.state.cr3, self.state.pdptes, tag)
            }
        }
    }

    /// Makes the root for `key` the current one: whether it has to be loaded, and what has to be flushed.
    fn select(&mut self, key: RootKey) -> (bool, TagFlush) {
        self.unprotected.is_pending = false;
        if self.roots.current().is_some_and(|current| current.key.is_same(&key)) {
            return (false, TagFlush::None);
        }
        self.park_tag();
        if self.roots.select(&key) {
            (false, self.run_on())
        } else {
            // The tag of a root that is not there yet is fresh, or flushed when it is.
            (true, if self.tags == Tags::One { TagFlush::All } else { TagFlush::None })
        }
    }

    /// Puts the state of the current root's own tag away.
    fn park_tag(&mut self) {
        if self.tags == Tags::PerRoot {
            // An address that is due is due in a tag that is not known, so it need not be kept.
            let tag = self.tag;
            if let Some(current) = self.roots.current_mut() {
                current.tag = tag;
            }
        }
    }

    /// The root that has become the current one is run on from now on, by its tag or by the one for all.
    fn run_on(&mut self) -> TagFlush {
        match (self.tags, self.roots.current()) {
            (Tags::PerRoot, Some(current)) => {
                self.tag = current.tag;
                self.address = None;
                TagFlush::None
            }
            _ if mutant::drops(FlushSite::RootSwitch) => TagFlush::None,
            _ => self.flush(),
        }
    }

    /// Roots that `covers` are behind by `how`: which those are, and what has to be flushed. Tags of their own that
    /// are not the current one are flushed when they are next used.
    fn fall_behind(&mut self, how: Sync, covers: impl Fn(&RootKey) -> bool) -> (RootSet, TagFlush) {
        let marked = self.roots.mark(how, covers);
        let flush = match how {
            _ if !marked.contains(RootSet::CURRENT) => TagFlush::None,
            Sync::Address(_) if mutant::drops(FlushSite::BehindAddress) => TagFlush::None,
            Sync::Address(address) => self.flush_address(address),
            Sync::All if mutant::drops(FlushSite::BehindAll) => TagFlush::None,
            Sync::All => self.flush_current(),
        };
        (marked, flush)
    }

    fn flush_current(&mut self) -> TagFlush {
        self.tag.cpu = None;
        self.address = None;
        TagFlush::All
    }

    /// The vCPU may be entered on the current root if nothing has to be done with it.
    fn settle_root(&mut self) {
        let ready = self
            .roots
            .current()
            .filter(|current| current.behind.is_none() || mutant::is(Mutant::BehindRootRuns));
        self.root = ready.map_or(Root::NONE, |current| current.root);
    }
}

/// A vCPU is in the guest, or on its way in or out; dropping this says that it has exited.
#[derive(Debug)]
#[must_use = "keep it until the vCPU has exited"]
pub struct Entered<'m> {
    seat: &'m Seat,
    root: Root,
    flush: TagFlush,
    obsolete: bool,
}

impl Entered<'_> {
    /// Whether the root must not be run on: all were made obsolete
    /// ([`invalidate_all`](crate::DirectMmu::invalidate_all)). Drop this,
    /// [set](Mmu::set_root) a root of now or [carry out](Mmu::carry_out) what is due, and enter anew.
    #[inline]
    pub const fn is_obsolete(&self) -> bool {
        self.obsolete
    }

    /// The root to run on.
    #[inline]
    pub const fn root(&self) -> Root {
        self.root
    }

    /// Whether to flush the tag.
    #[inline]
    pub const fn flush(&self) -> TagFlush {
        self.flush
    }
}

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        self.seat.leave_guest();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::{Cr0, Cr4, Efer, GuestCpu, PagingRegs};

    fn role(cr0: Cr0) -> CpuRole {
        let regs = PagingRegs { cr0, cr4: Cr4::PAE, efer: Efer::LMA };
        CpuRole::new(&regs, &GuestCpu { max_phys_addr: 40, gib_pages: true, pse36: true, amd: true })
    }

    fn root(address: u64) -> Root {
        Root::for_tests(address, 0)
    }

    /// C4: a fresh tag, a root switch, another CPU and a newer generation each flush once, and nothing else does.
    #[test]
    fn c4_the_tag_is_flushed_exactly_when_it_may_be_behind() {
        let memory = VmMemory::new(());
        let mut mmu = Mmu::new(role(Cr0::PG), root(0x1000));
        let other = CpuId::new(1).unwrap();
        let enter = |mmu: &mut Mmu, cpu| mmu.enter(&memory, cpu).flush();
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::All);
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::None);
        assert_eq!(mmu.set_root(root(0x1000)), TagFlush::None);
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::None);
        assert_eq!(mmu.set_root(root(0x2000)), TagFlush::All);
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::All);
        assert_eq!(enter(&mut mmu, other), TagFlush::All);
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::All);
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::None);
        memory.shootdown().request();
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::All);
        assert_eq!(enter(&mut mmu, CpuId::BOOT), TagFlush::None);
    }

    /// One address is flushed by itself only while nothing else is due.
    #[test]
    fn c5_an_address_is_flushed_alone_or_with_everything() {
        let memory = VmMemory::new(());
        let mut mmu = Mmu::new(role(Cr0::PG), root(0x1000));
        let (at, other) = (Gva::new(0x1000), Gva::new(0x2000));
        let on = [CpuId::BOOT, CpuId::new(1).unwrap()];
        assert_eq!(mmu.flush_address(at), TagFlush::All, "a tag that may hold anything");
        drop(mmu.enter(&memory, on[0]));
        assert_eq!(mmu.flush_address(at), TagFlush::Address(at));
        assert_eq!(mmu.flush_address(at), TagFlush::Address(at));
        assert_eq!(mmu.enter(&memory, on[0]).flush(), TagFlush::Address(at));
        assert_eq!(mmu.enter(&memory, on[0]).flush(), TagFlush::None);
        let _ = mmu.flush_address(at);
        assert_eq!(mmu.flush_address(other), TagFlush::All);
        assert_eq!(mmu.enter(&memory, on[0]).flush(), TagFlush::All);
        let _ = mmu.flush_address(at);
        assert_eq!(mmu.enter(&memory, on[1]).flush(), TagFlush::All, "another CPU");
        let _ = mmu.flush_address(at);
        memory.shootdown().request();
        assert_eq!(mmu.enter(&memory, on[1]).flush(), TagFlush::All, "a newer generation");
    }

    /// D7: no vCPU enters on an obsolete root unnoticed.
    #[test]
    fn d7_an_obsolete_root_is_noticed_at_the_entry() {
        let memory = VmMemory::new(());
        let mut mmu = Mmu::new(role(Cr0::PG), root(0x1000));
        assert!(!mmu.enter(&memory, CpuId::BOOT).is_obsolete());
        memory.exclusive(CpuId::BOOT).retire_roots();
        assert!(mmu.enter(&memory, CpuId::BOOT).is_obsolete());
        let _ = mmu.set_root(Root::for_tests(0x2000, 1));
        let entered = mmu.enter(&memory, CpuId::BOOT);
        assert_eq!((entered.is_obsolete(), entered.flush()), (false, TagFlush::All));
    }

    /// A toggle of CR0.WP is a new role and nothing else.
    #[test]
    fn cr0_wp_toggle_flushes_nothing() {
        let memory = VmMemory::new(());
        let mut mmu = Mmu::new(role(Cr0::PG), root(0x1000));
        drop(mmu.enter(&memory, CpuId::BOOT));
        mmu.set_role(role(Cr0::PG | Cr0::WP));
        assert_eq!(mmu.enter(&memory, CpuId::BOOT).flush(), TagFlush::None);
    }

    /// CVE-2022-39189: a vCPU that was not running when the flush was requested flushes before it runs again.
    #[test]
    fn cve_2022_39189_a_flush_reaches_a_vcpu_that_was_not_running() {
        let memory = VmMemory::new(());
        let mut running = Mmu::new(role(Cr0::PG), root(0x1000));
        let mut preempted = Mmu::new(role(Cr0::PG), root(0x1000));
        drop(preempted.enter(&memory, CpuId::BOOT));
        let entered = running.enter(&memory, CpuId::BOOT);
        let generation = memory.shootdown().request();
        assert!(!memory.shootdown().is_acknowledged(generation));
        drop(entered);
        assert_eq!(running.enter(&memory, CpuId::BOOT).flush(), TagFlush::All);
        assert!(memory.shootdown().is_acknowledged(generation));
        assert_eq!(
            preempted.enter(&memory, CpuId::BOOT).flush(),
            TagFlush::All,
            "its own tag is still behind"
        );
    }
}
