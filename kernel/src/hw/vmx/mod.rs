//! Intel VMX with EPT. SDM vol. 3, chapters 24 to 28.

pub mod access_rights;
pub mod controls;
pub mod event;
pub mod vmcs;
