//! A vCPU made of plain fields, for host tests of the code above the vendor trait.
use super::{CpuState, Event, Exit, HwVcpu, Segment, SegmentName, TableRegister};

/// State that a test sets and looks at.
#[derive(Debug, Default)]
pub(crate) struct FakeVcpu {
    pub(crate) gprs: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) cr: [u64; 9],
    pub(crate) efer: u64,
    pub(crate) dr6: u64,
    pub(crate) segments: [Segment; 6],
    pub(crate) shadow: bool,
    pub(crate) injected: Option<Event>,
    pub(crate) interrupted: Option<Event>,
    pub(crate) window: bool,
    pub(crate) nmis_blocked: bool,
    pub(crate) nmi_window: bool,
    pub(crate) cr8_exits: bool,
    pub(crate) flushes: u32,
    pub(crate) tsc_offset: u64,
    pub(crate) pat: u64,
}

impl HwVcpu for FakeVcpu {
    fn gprs(&self) -> &[u64; 16] {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut [u64; 16] {
        &mut self.gprs
    }
    type Ended = ();
    fn run(&mut self, _: usize) {
        self.injected = None;
    }
    fn exit(&mut self, (): ()) -> Exit {
        Exit::HostInterrupt
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, rip: u64) {
        self.rip = rip;
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        self.rflags = rflags;
    }
    fn cr0(&self) -> u64 {
        self.cr[0]
    }
    fn set_cr0(&mut self, cr0: u64) {
        self.cr[0] = cr0;
    }
    fn cr2(&self) -> u64 {
        self.cr[2]
    }
    fn set_cr2(&mut self, cr2: u64) {
        self.cr[2] = cr2;
    }
    fn cr3(&self) -> u64 {
        self.cr[3]
    }
    fn set_cr3(&mut self, cr3: u64) {
        self.cr[3] = cr3;
    }
    fn cr4(&self) -> u64 {
        self.cr[4]
    }
    fn set_cr4(&mut self, cr4: u64) {
        self.cr[4] = cr4;
    }
    fn cr8(&self) -> u8 {
        self.cr[8] as u8
    }
    fn set_cr8(&mut self, tpr: u8) {
        self.cr[8] = u64::from(tpr);
    }
    fn efer(&self) -> u64 {
        self.efer
    }
    fn set_efer(&mut self, efer: u64) {
        self.efer = efer;
    }
    fn dr6(&self) -> u64 {
        self.dr6
    }
    fn set_dr6(&mut self, dr6: u64) {
        self.dr6 = dr6;
    }
    fn dr7(&self) -> u64 {
        0x400
    }
    fn cpl(&self) -> u8 {
        0
    }
    fn segment(&self, name: SegmentName) -> Segment {
        self.segments[name as usize]
    }
    fn switched_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn set_switched_msr(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn set_pat(&mut self, pat: u64) {
        self.pat = pat;
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
    }
    fn state(&self) -> CpuState {
        CpuState {
            segments: self.segments,
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: self.cr[0],
            cr2: self.cr[2],
            cr3: self.cr[3],
            cr4: self.cr[4],
            efer: self.efer,
            dr6: self.dr6,
            dr7: 0x400,
            rflags: self.rflags,
            rip: self.rip,
        }
    }
    fn set_state(&mut self, state: &CpuState) {
        self.segments = state.segments;
        (self.cr[0], self.cr[2], self.cr[3], self.cr[4]) = (state.cr0, state.cr2, state.cr3, state.cr4);
        (self.efer, self.rflags, self.rip, self.dr6) = (state.efer, state.rflags, state.rip, state.dr6);
    }
    fn load_state(&mut self, state: &CpuState) {
        self.set_state(state);
        (self.injected, self.shadow, self.nmis_blocked) = (None, false, false);
    }
    fn exit_insn_bytes(&self) -> &[u8] {
        &[]
    }
    fn exit_next_rip(&self) -> Option<u64> {
        None
    }
    fn interrupts_open(&self) -> bool {
        self.rflags & 1 << 9 != 0 && !self.shadow && self.injected.is_none()
    }
    fn in_shadow(&self) -> bool {
        self.shadow
    }
    fn restore_shadow(&mut self) {
        self.shadow = true;
    }
    fn clear_shadow(&mut self) {
        self.shadow = false;
    }
    fn inject(&mut self, event: Event) {
        self.nmis_blocked |= event == Event::Nmi;
        self.injected = Some(event);
    }
    fn injecting(&self) -> bool {
        self.injected.is_some()
    }
    fn take_interrupted_event(&mut self) -> Option<Event> {
        self.nmis_blocked &= self.interrupted != Some(Event::Nmi);
        self.interrupted.take()
    }
    fn request_interrupt_window(&mut self, on: bool) {
        self.window = on;
    }
    fn nmis_blocked(&self) -> bool {
        self.nmis_blocked
    }
    fn set_nmis_blocked(&mut self, blocked: bool) {
        self.nmis_blocked = blocked;
    }
    fn request_nmi_window(&mut self, on: bool) {
        self.nmi_window = on;
    }
    fn intercept_cr8_writes(&mut self, on: bool) {
        self.cr8_exits = on;
    }
    fn set_root(&mut self, _: u64) {
        self.flushes += 1;
    }
    fn flush_tlb(&mut self) {
        self.flushes += 1;
    }
}
