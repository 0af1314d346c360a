//! Which accesses a translation permits, as constant tables indexed by role (AMD APM vol. 2, 5.6; Intel SDM vol. 3, 4.6).
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::role::{CpuRole, RoleFlags};

/// Forms of access: kind, user or not, SMAP suspended or not.
const ACCESSES: usize = 16;
/// Roles of ordinary tables that differ in WP, NX, SMEP or SMAP.
const ROLES: usize = 16;
/// Values of `Prot`.
const PROTS: u8 = Prot::all().bits() + 1;

/// For each form of access the translations that forbid it: bit `n` stands for `Prot` of bits `n`.
pub(super) type Permissions = [u32; ACCESSES];

/// The row of the tables for a role.
#[inline]
pub(super) const fn permissions(role: &CpuRole) -> &'static Permissions {
    if role.is_ept() {
        &EPT[role.flags().contains(RoleFlags::MODE_BASED_EXECUTE) as usize]
    } else {
        &TABLE[role.flags().bits() as usize % ROLES]
    }
}

/// Position of an access in a row. RFLAGS.AC suspends SMAP for explicit accesses only.
#[inline]
pub(super) const fn index(access: Access, ac: bool) -> usize {
    let user = matches!(access.agent, Agent::User) as usize;
    let suspended = (ac && matches!(access.agent, Agent::Supervisor)) as usize;
    access.kind as usize | user << 2 | suspended << 3
}

/// Whether a translation with `prot` forbids the access at `index`.
#[inline]
pub(super) const fn forbids(permissions: &Permissions, index: usize, prot: Prot) -> bool {
    permissions[index % ACCESSES] >> (prot.bits() % PROTS) & 1 != 0
}

/// Long mode, PAE and 32-bit paging; nested tables of AMD, too, for they are read in a role that has WP and no SMAP, and SMEP
/// as guest mode execute trap.
static TABLE: [Permissions; ROLES] = {
    let mut table = [[0; ACCESSES]; ROLES];
    let mut role = 0;
    while role < ROLES {
        let mut access = 0;
        while access < ACCESSES {
            let mut prot = 0;
            while prot < PROTS {
                if forbidden(RoleFlags::from_bits_truncate(role as u16), access, prot) {
                    table[role][access] |= 1 << prot;
                }
                prot += 1;
            }
            access += 1;
        }
        role += 1;
    }
    table
};

/// Extended page tables, without and with mode-based execute control.
static EPT: [Permissions; 2] = {
    let mut table = [[0; ACCESSES]; 2];
    let mut access = 0;
    while access < ACCESSES {
        let mut prot = 0;
        while prot < PROTS {
            table[0][access] |= (forbidden_by_ept(false, access, prot) as u32) << prot;
            table[1][access] |= (forbidden_by_ept(true, access, prot) as u32) << prot;
            prot += 1;
        }
        access += 1;
    }
    table
};

const fn is(access: usize, kind: AccessKind) -> bool {
    access & 3 == kind as usize
}

const fn is_user(access: usize) -> bool {
    access & 1 << 2 != 0
}

const fn forbidden(role: RoleFlags, access: usize, prot: u8) -> bool {
    let prot = Prot::from_bits_truncate(prot);
    let write = is(access, AccessKind::Write);
    let fetch = is(access, AccessKind::Execute);
    let user = is_user(access);
    let suspended = access & 1 << 3 != 0;
    let user_page = prot.contains(Prot::USER);

    let read_only = write && !prot.contains(Prot::WRITE) && (user || role.contains(RoleFlags::WP));
    let privileged = user && !user_page;
    let no_execute = fetch && !prot.contains(Prot::EXECUTE) && role.contains(RoleFlags::NX);
    let smep = role.contains(RoleFlags::SMEP) && fetch && !user && user_page;
    let smap = role.contains(RoleFlags::SMAP) && !fetch && !user && user_page && !suspended;
    read_only || privileged || no_execute || smep || smap
}

/// Reads, writes and fetches have a bit each; with mode-based execute control, fetches have one for either kind of linear
/// address (Intel SDM vol. 3, 29.3.3.2).
const fn forbidden_by_ept(mode_based: bool, access: usize, prot: u8) -> bool {
    let needed = if is(access, AccessKind::Write) {
        Prot::WRITE
    } else if !is(access, AccessKind::Execute) {
        Prot::READ
    } else if mode_based && is_user(access) {
        Prot::EXECUTE_USER
    } else {
        Prot::EXECUTE
    };
    !Prot::from_bits_truncate(prot).contains(needed)
}

const _: () = assert!(PROTS as u32 == u32::BITS);
