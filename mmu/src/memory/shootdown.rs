//! TLB shootdown and the reclamation of what it guards, one protocol (per-CPU quiescence).
//!
//! Whoever takes a translation away raises the *request* generation. A CPU *acknowledges* the newest generation when it
//! enters the guest, for then it is outside every walk, and the entry flushes the vCPU's tag if that is older
//! ([`Mmu::enter`](crate::Mmu::enter)). What was taken away at generation `g` is unreachable once every CPU either has
//! acknowledged `g` or is neither walking nor in the guest: whatever it starts later sees the new tables, and flushes
//! first.
//!
//! Each CPU has a *seat*, a cache line that only it writes in the common case. Seats are counters, so that a wrong CPU
//! number costs liveness and statistics, never safety.
use crate::cpu::{CpuId, CpuSet, MAX_CPUS};
use crate::mutant::{self, Mutant};
use crate::sync::{fence, fence_after_update, spin_loop, AtomicBool, AtomicU64, Ordering};

/// A flush generation: a point in time after which no CPU may use an older translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub(crate) u64);

/// Proof that nobody can reach some tables any more: what it takes to make a table page free again.
#[derive(Debug)]
pub(crate) struct Quiescent(());

impl Quiescent {
    /// A kind is being taken apart by its owner: no operation runs and no CPU is in the guest on its roots.
    pub(crate) const fn dismantled() -> Self {
        Self(())
    }
}

/// One vCPU in the guest, in a seat's state.
const IN_GUEST: u64 = 1;
/// One walk or operation, in a seat's state.
const WALK: u64 = 1 << 32;

/// What one CPU is doing with the VM.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Seat {
    /// Walks in bits 63:32, vCPUs in the guest in bits 31:0.
    state: AtomicU64,
    /// Newest generation the CPU has acknowledged.
    acknowledged: AtomicU64,
}

impl Seat {
    /// The vCPU has exited.
    #[inline]
    pub(crate) fn leave_guest(&self) {
        self.state.fetch_sub(IN_GUEST, Ordering::Release);
    }

    /// The walk, or the operation, has ended.
    #[inline]
    pub(crate) fn end_walk(&self) {
        self.state.fetch_sub(WALK, Ordering::Release);
    }

    fn new() -> Self {
        Self { state: AtomicU64::new(0), acknowledged: AtomicU64::new(0) }
    }
}

/// Flush generations, the CPUs' seats and the VM's lock. One per VM, in its [`VmMemory`](crate::VmMemory).
#[derive(Debug)]
pub struct Shootdown {
    request: AtomicU64,
    exclusive: AtomicBool,
    /// Seats in use: nobody looks at the others.
    count: usize,
    /// CPUs whose numbers are the same in these bits share a seat, if there are more CPUs than seats.
    mask: usize,
    seats: [Seat; MAX_CPUS],
}

impl Shootdown {
    /// For a VM that runs on CPUs with numbers below `cpus`.
    pub(crate) fn new(cpus: usize) -> Self {
        let few = cpus.checked_next_power_of_two().filter(|&count| count < MAX_CPUS);
        Self {
            request: AtomicU64::new(0),
            exclusive: AtomicBool::new(false),
            count: few.unwrap_or(MAX_CPUS),
            mask: few.map_or(usize::MAX, |count| count - 1),
            seats: core::array::from_fn(|_| Seat::new()),
        }
    }

    /// The newest generation that was requested.
    #[inline]
    pub fn requested(&self) -> Generation {
        Generation(self.request.load(Ordering::Acquire))
    }

    /// Requests a flush of everything cached so far.
    pub(crate) fn request(&self) -> Generation {
        // Release: what was taken away before is seen by every CPU that reads this generation or a later one.
        Generation(self.request.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Proof that nobody can reach what was taken away before `generation` was requested, if that is so.
    pub(crate) fn quiescent(&self, generation: Generation) -> Option<Quiescent> {
        (self.is_acknowledged(generation) || mutant::is(Mutant::ReclaimedAtOnce)).then_some(Quiescent(()))
    }

    /// Whether no CPU can still use a translation or a table that was taken away before `generation` was requested.
    pub fn is_acknowledged(&self, generation: Generation) -> bool {
        fence(Ordering::SeqCst);
        self.seats().all(|seat| {
            let state = seat.state.load(Ordering::Acquire);
            (if mutant::is(Mutant::WalksHoldNothing) { state % WALK } else { state }) == 0
                || seat.acknowledged.load(Ordering::Acquire) >= generation.0
        })
    }

    /// The CPUs in the guest that have not acknowledged `generation`: those that must be kicked out of it.
    pub fn laggards(&self, generation: Generation) -> CpuSet {
        fence(Ordering::SeqCst);
        let mut set = CpuSet::default();
        for (number, seat) in self.seats().enumerate() {
            let in_guest = seat.state.load(Ordering::Acquire) % WALK != 0;
            if let (true, Some(cpu)) = (in_guest && !mutant::is(Mutant::KickNobody), CpuId::new(number)) {
                if seat.acknowledged.load(Ordering::Acquire) < generation.0 {
                    set.insert(cpu);
                }
            }
        }
        set
    }

    #[inline]
    fn seat(&self, cpu: CpuId) -> &Seat {
        &self.seats[cpu.number() & self.mask]
    }

    #[inline]
    fn seats(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().take(self.count)
    }

    /// Marks `cpu` as in the guest and acknowledges the newest generation, which it returns, with the seat to leave.
    #[inline]
    pub(crate) fn enter_guest(&self, cpu: CpuId) -> (Generation, &Seat) {
        let seat = self.seat(cpu);
        // First visible as in the guest, then looking for requests: a requester that still sees the seat idle is
        // seen here (store buffering; a fence on both sides).
        let before = seat.state.fetch_add(IN_GUEST, Ordering::Acquire);
        fence_after_update();
        let generation = self.requested();
        if before == 0 || mutant::is(Mutant::AcknowledgesInWalk) {
            seat.acknowledged.store(generation.0, Ordering::Release);
        }
        (generation, seat)
    }

    /// Starts a walk or an operation, waiting while another CPU has the VM for itself; the seat to end it in.
    #[inline]
    pub(crate) fn begin_walk(&self, cpu: CpuId) -> &Seat {
        let seat = self.seat(cpu);
        loop {
            // Store buffering again: whoever takes the VM, or a table, and still sees the seat idle is seen here.
            seat.state.fetch_add(WALK, Ordering::Acquire);
            fence_after_update();
            if !self.exclusive.load(Ordering::Acquire) {
                return seat;
            }
            seat.state.fetch_sub(WALK, Ordering::Release);
            while self.exclusive.load(Ordering::Relaxed) {
                spin_loop();
            }
        }
    }

    /// Waits until nobody walks, and keeps it so.
    pub(crate) fn lock(&self) {
        while self.exclusive.swap(true, Ordering::Acquire) {
            spin_loop();
        }
        fence(Ordering::SeqCst);
        for seat in self.seats() {
            while seat.state.load(Ordering::Acquire) >= WALK && !mutant::is(Mutant::ExclusiveBesideWalks) {
                spin_loop();
            }
        }
    }

    pub(crate) fn unlock(&self) {
        self.exclusive.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: CpuId = CpuId::BOOT;

    #[test]
    fn an_idle_cpu_holds_nothing_back() {
        let shootdown = Shootdown::new(MAX_CPUS);
        assert!(shootdown.is_acknowledged(shootdown.request()));
    }

    #[test]
    fn a_walk_holds_back_until_it_ends() {
        let shootdown = Shootdown::new(MAX_CPUS);
        let walk = shootdown.begin_walk(CPU);
        let generation = shootdown.request();
        assert!(!shootdown.is_acknowledged(generation));
        assert!(shootdown.laggards(generation).is_empty(), "a walk ends by itself, no kick");
        walk.end_walk();
        assert!(shootdown.is_acknowledged(generation));
    }

    #[test]
    fn a_guest_holds_back_until_its_next_entry() {
        let shootdown = Shootdown::new(MAX_CPUS);
        let (first, guest) = shootdown.enter_guest(CPU);
        assert_eq!(first, Generation(0));
        let generation = shootdown.request();
        assert!(!shootdown.is_acknowledged(generation));
        assert!(shootdown.laggards(generation).contains(CPU));
        guest.leave_guest();
        assert_eq!(shootdown.enter_guest(CPU).0, generation);
        assert!(shootdown.is_acknowledged(generation));
        assert!(shootdown.laggards(generation).is_empty());
    }

    #[test]
    fn a_cpu_with_an_unexpected_number_is_not_overlooked() {
        let shootdown = Shootdown::new(3);
        let cpu = CpuId::new(5).unwrap();
        let walk = shootdown.begin_walk(cpu);
        let generation = shootdown.request();
        assert!(!shootdown.is_acknowledged(generation));
        walk.end_walk();
        assert!(shootdown.is_acknowledged(generation));
    }

    #[test]
    fn an_entry_inside_a_walk_acknowledges_nothing() {
        let shootdown = Shootdown::new(MAX_CPUS);
        let _walk = shootdown.begin_walk(CPU);
        let generation = shootdown.request();
        let _guest = shootdown.enter_guest(CPU);
        assert!(!shootdown.is_acknowledged(generation));
    }
}
