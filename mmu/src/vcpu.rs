//! What a vCPU needs while it runs: its role, its root, and whether its TLB tag is behind.
use crate::cpu::CpuId;
use crate::kind::Root;
use crate::memory::{Generation, VmMemory};
use crate::role::CpuRole;

/// Whether the vCPU's TLB tag (ASID or VPID) must be flushed before it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a tag that is not flushed keeps old translations"]
pub enum TagFlush {
    /// What the tag holds is current.
    None,
    /// Everything the tag holds must go.
    All,
}

/// The run state of one vCPU's second stage: the sketch's `root_mmu`.
///
/// It owns a TLB tag, so whatever makes the tag's content wrong is remembered here until the next
/// [`enter`](Self::enter): a root switch, another physical CPU, a flush generation.
#[derive(Debug)]
pub struct Mmu {
    role: CpuRole,
    root: Root,
    /// Generation up to which the tag is current.
    flushed: Generation,
    /// CPU whose TLB has the tag; `None` if the tag may hold anything.
    cpu: Option<CpuId>,
}

impl Mmu {
    /// A vCPU that will run on `root`, with a tag that may hold anything.
    pub const fn new(role: CpuRole, root: Root) -> Self {
        Self { role, root, flushed: Generation(0), cpu: None }
    }

    /// The role, as last set.
    #[inline]
    pub const fn role(&self) -> CpuRole {
        self.role
    }

    /// Says that the registers make another role now. The direct kind has one root for all roles, so this is an
    /// assignment; the tag stays as it is.
    #[inline]
    pub fn set_role(&mut self, role: CpuRole) {
        self.role = role;
    }

    /// The root the vCPU runs on.
    #[inline]
    pub const fn root(&self) -> Root {
        self.root
    }

    /// Switches to `root`. A flush that follows is also remembered until the next entry.
    pub fn set_root(&mut self, root: Root) -> TagFlush {
        if root == self.root {
            return TagFlush::None;
        }
        self.root = root;
        self.flush()
    }

    /// The tag must be flushed at the next entry: the guest asked for it, or the tag was another vCPU's before.
    pub fn flush(&mut self) -> TagFlush {
        self.cpu = None;
        TagFlush::All
    }

    /// Begins to run the vCPU on `cpu`, interrupts off, no guard held. The returned value says whether to flush the tag
    /// on the way in, and is kept until the vCPU has exited.
    ///
    /// From here on whoever takes a translation away finds this CPU in the guest and kicks it.
    #[inline]
    pub fn enter<'m, B>(&mut self, memory: &'m VmMemory<B>, cpu: CpuId) -> Entered<'m, B> {
        let generation = memory.shootdown().enter_guest(cpu);
        let current = self.cpu == Some(cpu) && self.flushed >= generation;
        self.cpu = Some(cpu);
        self.flushed = generation;
        let flush = if current { TagFlush::None } else { TagFlush::All };
        // After the seat was taken, as for the flush: either this sees that the roots are obsolete, or whoever made them
        // so sees this CPU in the guest.
        let obsolete = self.root.generation() != memory.root_generation();
        Entered { memory, cpu, root: self.root, flush, obsolete }
    }
}

/// A vCPU is in the guest, or on its way in or out; dropping this says that it has exited.
#[derive(Debug)]
#[must_use = "keep it until the vCPU has exited"]
pub struct Entered<'m, B> {
    memory: &'m VmMemory<B>,
    cpu: CpuId,
    root: Root,
    flush: TagFlush,
    obsolete: bool,
}

impl<B> Entered<'_, B> {
    /// Whether the root must not be run on: all were made obsolete
    /// ([`invalidate_all`](crate::DirectMmu::invalidate_all)). Drop this, [set](Mmu::set_root) a root of now, enter anew.
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

impl<B> Drop for Entered<'_, B> {
    #[inline]
    fn drop(&mut self) {
        self.memory.shootdown().leave_guest(self.cpu);
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
