//! nvmf-initiator
