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
use core::hint::spin_loop;
use core::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};

use crate::cpu::{CpuId, CpuSet, MAX_CPUS};

/// A flush generation: a point in time after which no CPU may use an older translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub(crate) u64);

/// One vCPU in the guest, in a seat's state.
const IN_GUEST: u64 = 1;
/// One walk or operation, in a seat's state.
const WALK: u64 = 1 << 32;

/// What one CPU is doing with the VM.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Seat {
    /// Walks in bits 63:32, vCPUs in the guest in bits 31:0.
    state: AtomicU64,
    /// Newest generation the CPU has acknowledged.
    acknowledged: AtomicU64,
}

impl Seat {
    const fn new() -> Self {
        Self { state: AtomicU64::new(0), acknowledged: AtomicU64::new(0) }
    }
}

/// Flush generations, the CPUs' seats and the VM's lock. One per VM, in its [`VmMemory`](crate::VmMemory).
#[derive(Debug)]
pub struct Shootdown {
    request: AtomicU64,
    exclusive: AtomicBool,
    seats: [Seat; MAX_CPUS],
}

impl Shootdown {
    pub(crate) const fn new() -> Self {
        Self {
            request: AtomicU64::new(0),
            exclusive: AtomicBool::new(false),
            seats: [const { Seat::new() }; MAX_CPUS],
        }
    }

    /// The newest generation that was requested.
    #[inline]
    pub fn requested(&self) -> Generation {
        Generation(self.request.load(Ordering::SeqCst))
    }

    /// Requests a flush of everything cached so far.
    pub(crate) fn request(&self) -> Generation {
        // SeqCst: what was taken away before is seen by every CPU that reads this generation or a later one.
        Generation(self.request.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Whether no CPU can still use a translation or a table that was taken away before `generation` was requested.
    pub fn is_acknowledged(&self, generation: Generation) -> bool {
        fence(Ordering::SeqCst);
        self.seats.iter().all(|seat| {
            seat.state.load(Ordering::SeqCst) == 0 || seat.acknowledged.load(Ordering::SeqCst) >= generation.0
        })
    }

    /// The CPUs in the guest that have not acknowledged `generation`: those that must be kicked out of it.
    pub fn laggards(&self, generation: Generation) -> CpuSet {
        fence(Ordering::SeqCst);
        let mut set = CpuSet::default();
        for (number, seat) in self.seats.iter().enumerate() {
            let in_guest = seat.state.load(Ordering::SeqCst) % WALK != 0;
            if let (true, Some(cpu)) = (in_guest, CpuId::new(number)) {
                if seat.acknowledged.load(Ordering::SeqCst) < generation.0 {
                    set.insert(cpu);
                }
            }
        }
        set
    }

    #[inline]
    fn seat(&self, cpu: CpuId) -> &Seat {
        &self.seats[cpu.number()]
    }

    /// Marks `cpu` as in the guest and acknowledges the newest generation, which it returns.
    #[inline]
    pub(crate) fn enter_guest(&self, cpu: CpuId) -> Generation {
        let seat = self.seat(cpu);
        // First visible as in the guest, then looking for requests: a requester that still sees the seat idle is
        // seen here (store buffering; both sides are sequentially consistent).
        let before = seat.state.fetch_add(IN_GUEST, Ordering::SeqCst);
        let generation = self.requested();
        if before == 0 {
            seat.acknowledged.store(generation.0, Ordering::SeqCst);
        }
        generation
    }

    #[inline]
    pub(crate) fn leave_guest(&self, cpu: CpuId) {
        self.seat(cpu).state.fetch_sub(IN_GUEST, Ordering::SeqCst);
    }

    /// Starts a walk or an operation, waiting while another CPU has the VM for itself.
    #[inline]
    pub(crate) fn begin_walk(&self, cpu: CpuId) {
        let seat = self.seat(cpu);
        loop {
            seat.state.fetch_add(WALK, Ordering::SeqCst);
            if !self.exclusive.load(Ordering::SeqCst) {
                return;
            }
            seat.state.fetch_sub(WALK, Ordering::SeqCst);
            while self.exclusive.load(Ordering::Relaxed) {
                spin_loop();
            }
        }
    }

    #[inline]
    pub(crate) fn end_walk(&self, cpu: CpuId) {
        self.seat(cpu).state.fetch_sub(WALK, Ordering::SeqCst);
    }

    /// Waits until nobody walks, and keeps it so.
    pub(crate) fn lock(&self) {
        while self.exclusive.swap(true, Ordering::SeqCst) {
            spin_loop();
        }
        for seat in &self.seats {
            while seat.state.load(Ordering::SeqCst) >= WALK {
                spin_loop();
            }
        }
    }

    pub(crate) fn unlock(&self) {
        self.exclusive.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: CpuId = CpuId::BOOT;

    #[test]
    fn an_idle_cpu_holds_nothing_back() {
        let shootdown = Shootdown::new();
        assert!(shootdown.is_acknowledged(shootdown.request()));
    }

    #[test]
    fn a_walk_holds_back_until_it_ends() {
        let shootdown = Shootdown::new();
        shootdown.begin_walk(CPU);
        let generation = shootdown.request();
        assert!(!shootdown.is_acknowledged(generation));
        assert!(shootdown.laggards(generation).is_empty(), "a walk ends by itself, no kick");
        shootdown.end_walk(CPU);
        assert!(shootdown.is_acknowledged(generation));
    }

    #[test]
    fn a_guest_holds_back_until_its_next_entry() {
        let shootdown = Shootdown::new();
        assert_eq!(shootdown.enter_guest(CPU), Generation(0));
        let generation = shootdown.request();
        assert!(!shootdown.is_acknowledged(generation));
        assert!(shootdown.laggards(generation).contains(CPU));
        shootdown.leave_guest(CPU);
        assert_eq!(shootdown.enter_guest(CPU), generation);
        assert!(shootdown.is_acknowledged(generation));
        assert!(shootdown.laggards(generation).is_empty());
    }

    #[test]
    fn an_entry_inside_a_walk_acknowledges_nothing() {
        let shootdown = Shootdown::new();
        shootdown.begin_walk(CPU);
        let generation = shootdown.request();
        shootdown.enter_guest(CPU);
        assert!(!shootdown.is_acknowledged(generation));
    }
}
