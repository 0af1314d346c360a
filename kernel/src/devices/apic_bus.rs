//! The interrupt message bus: how messages of I/O APICs, MSIs and other CPUs reach a local APIC.
//!
//! A vCPU owns its [`LocalApic`](super::lapic::LocalApic) alone; what others may touch is its [`ApicPort`], a
//! mailbox of atomics beside a published summary of the APIC's addressing registers. A sender matches destinations
//! against the summaries and drops the message into the mailboxes; the owner empties its mailbox before it next
//! enters the guest. All of it is allocated when the VM is made, so a delivery never allocates and never blocks.
//!
//! Intel SDM vol. 3, chapter 11 ("Advanced Programmable Interrupt Controller", 10 in older editions); AMD APM
//! vol. 2, chapter 16.
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};

/// Most vCPUs of one VM. APIC IDs are vCPU indices, so every ID fits the 8-bit destination of an I/O APIC.
pub const MAX_VCPUS: usize = 64;

/// Fixed interrupts need a vector of at least this; lower ones are illegal (SDM 11.5.2).
pub const FIRST_LEGAL_VECTOR: u8 = 16;

/// Delivery mode of a message, with its encoding in ICR, LVT, redirection entries and MSI data (SDM 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    /// The vector, to every destination.
    Fixed = 0,
    /// The vector, to the destination that runs at the lowest priority.
    LowestPriority = 1,
    /// System-management interrupt.
    Smi = 2,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT.
    Init = 5,
    /// Startup IPI; the vector is the page number of the first instruction.
    StartUp = 6,
    /// The vector comes from the 8259 pair.
    ExtInt = 7,
}

impl DeliveryMode {
    /// Decodes the low three bits of `bits`; 3 ("remote read" once) is reserved.
    #[inline]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}

/// Trigger mode of a vectored message: what the target's TMR bit becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// No EOI goes back.
    Edge,
    /// The I/O APIC waits for the EOI.
    Level,
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The APIC with this ID.
    Physical(u32),
    /// The APICs whose logical address matches: 8 bits for APICs in xAPIC mode, 32 in x2APIC mode.
    Logical(u32),
    /// Everyone.
    All,
    /// Everyone but the vCPU of this index.
    AllBut(u8),
    /// The vCPU of this index.
    One(u8),
}

impl Destination {
    /// The 8-bit destination field of an I/O APIC, an MSI or an xAPIC ICR: all ones is everyone in either mode
    /// (SDM 11.6.2), also for APICs in x2APIC mode, which an 8-bit message cannot otherwise address as a whole.
    #[inline]
    pub const fn from_u8(field: u8, logical: bool) -> Self {
        match (field, logical) {
            (0xff, _) => Self::All,
            (mda, true) => Self::Logical(mda as u32),
            (id, false) => Self::Physical(id as u32),
        }
    }

    /// The 32-bit destination field of an x2APIC ICR (SDM 11.12.9).
    #[inline]
    pub const fn from_u32(field: u32, logical: bool) -> Self {
        match (field, logical) {
            (u32::MAX, _) => Self::All,
            (mda, true) => Self::Logical(mda),
            (id, false) => Self::Physical(id),
        }
    }
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicMessage {
    /// Whom it is for.
    pub destination: Destination,
    /// What it is.
    pub mode: DeliveryMode,
    /// Meaningful for [`DeliveryMode::Fixed`] and [`DeliveryMode::LowestPriority`].
    pub trigger: Trigger,
    /// Vector, or start page for [`DeliveryMode::StartUp`]; ignored by the other modes.
    pub vector: u8,
}

impl ApicMessage {
    /// Decodes a message-signalled interrupt: a 32-bit write of `data` to `address` (SDM 11.11). `None` if the
    /// address is outside `0xFEEx_xxxx` or the delivery mode is reserved.
    ///
    /// The destination mode bit is honoured whether or not the redirection hint is set, as software expects; the
    /// hint turns a fixed message into a lowest-priority one.
    #[inline]
    pub const fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let mode = match DeliveryMode::from_bits(data >> 8) {
            Some(DeliveryMode::Fixed) if address & (1 << 3) != 0 => DeliveryMode::LowestPriority,
            Some(mode) => mode,
            None => return None,
        };
        let trigger = if data & (1 << 15) != 0 { Trigger::Level } else { Trigger::Edge };
        Some(Self {
            destination: Destination::from_u8((address >> 12) as u8, address & (1 << 2) != 0),
            mode,
            trigger,
            vector: data as u8,
        })
    }
}

/// A set of vCPU indices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuSet(pub u64);

impl VcpuSet {
    /// No vCPU.
    pub const EMPTY: Self = Self(0);

    /// Whether the set is empty.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `index` is in the set.
    #[inline]
    pub const fn contains(self, index: usize) -> bool {
        index < 64 && self.0 >> index & 1 != 0
    }

    #[inline]
    fn insert(&mut self, index: usize) {
        self.0 |= 1 << (index & 63);
    }
}

impl Iterator for VcpuSet {
    type Item = usize;

    /// Takes the lowest index out of the set.
    #[inline]
    fn next(&mut self) -> Option<usize> {
        (self.0 != 0).then(|| {
            let index = self.0.trailing_zeros() as usize;
            self.0 &= self.0 - 1;
            index
        })
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the woken vCPUs must be kicked"]
pub struct Delivery {
    /// The vCPUs whose APIC took the message.
    pub accepted: VcpuSet,
    /// Those among them whose mailbox was empty before: they need a kick. The others have had theirs.
    pub woken: VcpuSet,
}

/// Where an interrupt source sends its messages; answers whether some APIC took it.
pub trait ApicSink {
    /// Delivers `message`.
    fn send(&mut self, message: ApicMessage) -> bool;
}

impl<F: FnMut(ApicMessage) -> bool> ApicSink for F {
    #[inline]
    fn send(&mut self, message: ApicMessage) -> bool {
        self(message)
    }
}

/// An [`ApicSink`] onto a bus that remembers whom to kick.
pub struct BusSink<'a> {
    bus: &'a ApicBus,
    /// The vCPUs woken so far.
    pub woken: VcpuSet,
}

impl<'a> BusSink<'a> {
    /// A sink onto `bus` that has woken nobody yet.
    pub const fn new(bus: &'a ApicBus) -> Self {
        Self { bus, woken: VcpuSet::EMPTY }
    }
}

impl ApicSink for BusSink<'_> {
    #[inline]
    fn send(&mut self, message: ApicMessage) -> bool {
        let delivery = self.bus.deliver(message);
        self.woken.0 |= delivery.woken.0;
        !delivery.accepted.is_empty()
    }
}

/// What a sender must know of an APIC to address it, packed into one word so that nobody sees half a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64);

impl Identity {
    const PRIORITY: u64 = 0xff;
    const ENABLED: u64 = 1 << 8;
    const X2APIC: u64 = 1 << 9;
    const SOFTWARE_ENABLED: u64 = 1 << 10;
    const FLAT: u64 = 1 << 11;
    const LDR_SHIFT: u32 = 32;

    /// An APIC that is globally disabled: it takes no message.
    pub const DISABLED: Self = Self(0);

    /// An enabled APIC. `ldr` is the whole register of the mode in force: logical ID in bits 31:24 in xAPIC mode,
    /// cluster and bit in x2APIC mode.
    #[inline]
    pub const fn new(x2apic: bool, software_enabled: bool, flat: bool, ldr: u32, priority: u8) -> Self {
        let mut word = Self::ENABLED | priority as u64 | (ldr as u64) << Self::LDR_SHIFT;
        if x2apic {
            word |= Self::X2APIC;
        }
        if software_enabled {
            word |= Self::SOFTWARE_ENABLED;
        }
        if flat {
            word |= Self::FLAT;
        }
        Self(word)
    }

    /// The same APIC at another processor priority.
    #[inline]
    pub const fn with_priority(self, priority: u8) -> Self {
        if self.0 & Self::ENABLED == 0 {
            return self;
        }
        Self(self.0 & !Self::PRIORITY | priority as u64)
    }

    #[inline]
    const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    #[inline]
    const fn priority(self) -> u8 {
        self.0 as u8
    }

    /// Whether a logical destination addresses this APIC (SDM 11.6.2.2, 11.12.10).
    #[inline]
    const fn matches_logical(self, mda: u32) -> bool {
        let ldr = (self.0 >> Self::LDR_SHIFT) as u32;
        if self.has(Self::X2APIC) {
            return mda >> 16 == ldr >> 16 && mda & ldr & 0xffff != 0;
        }
        let id = ldr >> 24;
        if mda > 0xff {
            false
        } else if self.has(Self::FLAT) {
            mda & id != 0
        } else {
            mda >> 4 == id >> 4 && mda & id & 0xf != 0
        }
    }

    /// Whether the APIC takes messages of this mode now: nothing while globally disabled (SDM 11.4.3), only NMI,
    /// SMI, INIT and SIPI while software-disabled (SDM 11.4.7.2).
    #[inline]
    const fn takes(self, mode: DeliveryMode) -> bool {
        let vectored =
            matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority | DeliveryMode::ExtInt);
        self.has(Self::ENABLED) && (!vectored || self.has(Self::SOFTWARE_ENABLED))
    }
}

/// What a mailbox held when it was emptied, or what a local interrupt asks of the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests(u32);

impl Requests {
    /// Bits 0 to 3: the 64-vector groups with something pending.
    pub(super) const GROUPS: u32 = 0xf;
    pub(super) const NMI: u32 = 1 << 4;
    pub(super) const SMI: u32 = 1 << 5;
    pub(super) const INIT: u32 = 1 << 6;
    pub(super) const SIPI: u32 = 1 << 7;
    pub(super) const EXTINT: u32 = 1 << 8;
    pub(super) const ILLEGAL_VECTOR: u32 = 1 << 9;
    const SIPI_VECTOR_SHIFT: u32 = 24;

    /// Nothing is asked.
    pub const NONE: Self = Self(0);

    #[inline]
    pub(super) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    #[inline]
    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    /// Whether nothing is asked.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// An NMI arrived.
    #[inline]
    pub const fn nmi(self) -> bool {
        self.0 & Self::NMI != 0
    }

    /// An SMI arrived.
    #[inline]
    pub const fn smi(self) -> bool {
        self.0 & Self::SMI != 0
    }

    /// An INIT arrived; it precedes a start-up request seen with it.
    #[inline]
    pub const fn init(self) -> bool {
        self.0 & Self::INIT != 0
    }

    /// A start-up IPI arrived, with this vector. It counts only for a CPU that waits for one.
    #[inline]
    pub const fn sipi(self) -> Option<u8> {
        if self.0 & Self::SIPI != 0 {
            Some((self.0 >> Self::SIPI_VECTOR_SHIFT) as u8)
        } else {
            None
        }
    }
}

/// The part of a vCPU's local APIC that others may touch.
#[repr(align(64))]
pub struct ApicPort {
    /// [`Requests`] bits. Set after what they announce, taken before it.
    requests: AtomicU32,
    sipi_vector: AtomicU8,
    identity: AtomicU64,
    /// Pending vectors.
    vectors: [AtomicU64; 4],
    /// Trigger mode of each pending vector.
    level: [AtomicU64; 4],
}

impl ApicPort {
    fn new() -> Self {
        Self {
            requests: AtomicU32::new(0),
            sipi_vector: AtomicU8::new(0),
            identity: AtomicU64::new(Identity::DISABLED.0),
            vectors: [const { AtomicU64::new(0) }; 4],
            level: [const { AtomicU64::new(0) }; 4],
        }
    }

    /// Whether the mailbox is empty: one load, for a halted vCPU or the entry path.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.requests.load(Ordering::Relaxed) == 0
    }

    /// What senders see of the APIC from now on.
    #[inline]
    pub fn publish(&self, identity: Identity) {
        self.identity.store(identity.0, Ordering::Release);
    }

    /// What senders see of the APIC.
    #[inline]
    pub fn identity(&self) -> Identity {
        Identity(self.identity.load(Ordering::Acquire))
    }

    /// Empties the mailbox. `vector` gets each group of pending vectors: group number, pending bits, level bits.
    #[inline]
    pub(super) fn take(&self, mut vectors: impl FnMut(usize, u64, u64)) -> Requests {
        if self.is_empty() {
            return Requests::NONE;
        }
        let mut bits = self.requests.swap(0, Ordering::Acquire);
        if bits & Requests::SIPI != 0 {
            bits |= u32::from(self.sipi_vector.load(Ordering::Relaxed)) << Requests::SIPI_VECTOR_SHIFT;
        }
        let mut groups = bits & Requests::GROUPS;
        while groups != 0 {
            let group = groups.trailing_zeros() as usize;
            groups &= groups - 1;
            let pending = self.vectors[group].swap(0, Ordering::Acquire);
            vectors(group, pending, self.level[group].load(Ordering::Relaxed) & pending);
        }
        Requests(bits)
    }

    /// Forgets everything pending: a reset of the whole VM.
    pub fn clear(&self) {
        let _ = self.take(|_, _, _| {});
    }

    /// Announces `bits`; answers whether the mailbox was empty.
    #[inline]
    fn post(&self, bits: u32) -> bool {
        self.requests.fetch_or(bits, Ordering::Release) == 0
    }

    #[inline]
    fn post_vector(&self, vector: u8, trigger: Trigger) -> bool {
        let (group, bit) = (usize::from(vector >> 6), 1 << (vector & 63));
        match trigger {
            Trigger::Level => {
                self.level[group].fetch_or(bit, Ordering::Relaxed);
            }
            Trigger::Edge if self.level[group].load(Ordering::Relaxed) & bit != 0 => {
                self.level[group].fetch_and(!bit, Ordering::Relaxed);
            }
            Trigger::Edge => {}
        }
        self.vectors[group].fetch_or(bit, Ordering::Release);
        self.post(1 << group)
    }

    /// Puts a message into the mailbox: whether it is accepted, and whether the mailbox was empty.
    #[inline]
    fn receive(&self, message: ApicMessage) -> (bool, bool) {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if message.vector < FIRST_LEGAL_VECTOR {
                    return (false, self.post(Requests::ILLEGAL_VECTOR));
                }
                (true, self.post_vector(message.vector, message.trigger))
            }
            DeliveryMode::Smi => (true, self.post(Requests::SMI)),
            DeliveryMode::Nmi => (true, self.post(Requests::NMI)),
            DeliveryMode::Init => {
                // A start-up request that came earlier is void.
                self.requests.fetch_and(!Requests::SIPI, Ordering::Relaxed);
                (true, self.post(Requests::INIT))
            }
            DeliveryMode::StartUp => {
                self.sipi_vector.store(message.vector, Ordering::Relaxed);
                (true, self.post(Requests::SIPI))
            }
            DeliveryMode::ExtInt => (true, self.post(Requests::EXTINT)),
        }
    }
}

/// All ports of a VM. The index of a vCPU is its APIC ID.
pub struct ApicBus {
    ports: Box<[ApicPort]>,
}

impl ApicBus {
    /// A bus for `vcpus` vCPUs (1 to [`MAX_VCPUS`], clamped), or the allocation's failure.
    pub fn new(vcpus: usize) -> Result<Self, TryReserveError> {
        let vcpus = vcpus.clamp(1, MAX_VCPUS);
        let mut ports = Vec::new();
        ports.try_reserve_exact(vcpus)?;
        ports.resize_with(vcpus, ApicPort::new);
        Ok(Self { ports: ports.into_boxed_slice() })
    }

    /// The port of a vCPU.
    #[inline]
    pub fn port(&self, vcpu: usize) -> Option<&ApicPort> {
        self.ports.get(vcpu)
    }

    /// Delivers a message to whom it is for. Callable from any CPU at any time.
    pub fn deliver(&self, message: ApicMessage) -> Delivery {
        let mut delivery = Delivery::default();
        match message.destination {
            // The common case needs no search, and no arbitration among one.
            Destination::Physical(id) => self.offer(id as usize, message, &mut delivery),
            Destination::One(index) => self.offer(usize::from(index), message, &mut delivery),
            _ if message.mode == DeliveryMode::LowestPriority => {
                if let Some(index) = self.arbitrate(message) {
                    self.offer(index, message, &mut delivery);
                }
            }
            _ => {
                for (index, port) in self.ports.iter().enumerate() {
                    if is_addressed(index, port.identity(), message.destination) {
                        self.offer(index, message, &mut delivery);
                    }
                }
            }
        }
        delivery
    }

    #[inline]
    fn offer(&self, index: usize, message: ApicMessage, delivery: &mut Delivery) {
        let Some(port) = self.ports.get(index) else { return };
        if !port.identity().takes(message.mode) {
            return;
        }
        let (accepted, was_empty) = port.receive(message);
        if accepted {
            delivery.accepted.insert(index);
        }
        if was_empty {
            delivery.woken.insert(index);
        }
    }

    /// Chooses the target of a lowest-priority message: among those at the lowest priority class, the one that the
    /// vector hashes to, so that a vector stays with a CPU whose caches know it and vectors spread over CPUs.
    fn arbitrate(&self, message: ApicMessage) -> Option<usize> {
        let mut lowest = u8::MAX;
        let mut candidates = VcpuSet::EMPTY;
        for (index, port) in self.ports.iter().enumerate() {
            let identity = port.identity();
            if !identity.takes(message.mode) || !is_addressed(index, identity, message.destination) {
                continue;
            }
            let class = identity.priority() >> 4;
            if class < lowest {
                lowest = class;
                candidates = VcpuSet::EMPTY;
            }
            if class == lowest {
                candidates.insert(index);
            }
        }
        let count = candidates.0.count_ones() as usize;
        candidates.nth(usize::from(message.vector).checked_rem(count)?)
    }
}

#[inline]
fn is_addressed(index: usize, identity: Identity, destination: Destination) -> bool {
    match destination {
        Destination::Physical(id) => id as usize == index,
        Destination::Logical(mda) => identity.matches_logical(mda),
        Destination::All => true,
        Destination::AllBut(other) => usize::from(other) != index,
        Destination::One(one) => usize::from(one) == index,
    }
}

#[cfg(test)]
mod tests;
