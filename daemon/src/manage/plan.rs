//! What to serve: the configuration with the run-time changes that still hold laid over it.
//!
//! The rule is the same for every value: a change made at run time holds as long as the
//! configuration says what it said then. An edit of the configuration overtakes it. Objects made
//! at run time are served beside the configured ones; when the configuration comes to name the same
//! object in the same way, it is the configuration's from then on, and in another way is an error.

use anyhow::{Context, bail};
use block::{Identity, VolumeSpec};
use nvme::spec::Nqn;

use crate::config::{Config, ReferralConfig, TargetConfig, parse_referral};
use crate::state::{Change, Hosts, State, StoredReferral};

/// A subsystem as it is served.
#[derive(Debug, Clone)]
pub(crate) struct SubsystemRecord {
    pub(crate) name: String,
    pub(crate) nqn: Nqn,
    pub(crate) serial: [u8; 20],
    /// It is not in the configuration.
    pub(crate) runtime: bool,
    pub(crate) hosts: Option<Vec<Nqn>>,
    /// What the configuration says.
    pub(crate) configured_hosts: Option<Vec<Nqn>>,
}

/// A volume, served or detached.
#[derive(Debug, Clone)]
pub(crate) struct VolumeRecord {
    pub(crate) name: String,
    pub(crate) spec: VolumeSpec,
    pub(crate) subsystem: String,
    pub(crate) nsid: u32,
    pub(crate) identity: Identity,
    /// It is not in the configuration.
    pub(crate) runtime: bool,
    /// It is to be served.
    pub(crate) wanted: bool,
    pub(crate) ana_group: u32,
    pub(crate) configured_group: u32,
    pub(crate) hosts: Option<Vec<Nqn>>,
    pub(crate) configured_hosts: Option<Vec<Nqn>>,
    pub(crate) write_protect: bool,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub(crate) subsystems: Vec<SubsystemRecord>,
    pub(crate) volumes: Vec<VolumeRecord>,
    pub(crate) referrals: Vec<ReferralConfig>,
    /// Discovery subsystem.
    pub(crate) discovery_nqn: Option<Nqn>,
    /// What became of run-time changes that no longer hold.
    pub(crate) notices: Vec<String>,
}

/// Lays the state over the configuration. Mints what is missing; nothing is saved here.
pub(crate) fn plan(
    config: &Config,
    target: &TargetConfig,
    state: &mut State,
    place: &str,
) -> anyhow::Result<Plan> {
    let mut plan = Plan::default();
    plan.subsystems(target, state, place)?;
    let nqn = state.discovery_nqn(target.discovery_nqn.as_ref(), place);
    if let Some(twin) = plan.subsystems.iter().find(|subsystem| subsystem.nqn == nqn) {
        bail!("the discovery subsystem and subsystem {:?} share the NQN {nqn}", twin.name);
    }
    plan.discovery_nqn = Some(nqn);
    plan.volumes(config, state)?;
    plan.referrals(target, state)?;
    Ok(plan)
}

impl Plan {
    fn subsystems(
        &mut self,
        target: &TargetConfig,
        state: &mut State,
        place: &str,
    ) -> anyhow::Result<()> {
        for configured in &target.subsystems {
            let known = state.stored().subsystems.iter().find(|s| s.name == configured.name);
            if let (Some(known), Some(nqn)) = (known, &configured.nqn)
                && known.runtime
                && known.nqn != *nqn
            {
                bail!(
                    "subsystem {:?} was made at run time with the NQN {} and the configuration \
                     says {nqn}; take nqn out of the configuration, or choose another name",
                    configured.name,
                    known.nqn
                );
            }
            let identity = state.named_subsystem(&configured.name, configured.nqn.as_ref(), place);
            let stored = state.stored_mut().subsystems.iter_mut();
            let mut hosts = configured.hosts.clone();
            if let Some(stored) = stored.into_iter().find(|s| s.name == configured.name) {
                stored.runtime = false;
                hosts = self.hosts("subsystem", &stored.name, &mut stored.hosts, &hosts);
            }
            self.subsystems.push(SubsystemRecord {
                name: configured.name.clone(),
                nqn: identity.nqn,
                serial: identity.serial,
                runtime: false,
                hosts,
                configured_hosts: configured.hosts.clone(),
            });
        }
        let made: Vec<_> =
            state.stored().subsystems.iter().filter(|s| s.runtime).cloned().collect();
        for mut stored in made {
            let identity = state.named_subsystem(&stored.name, None, place);
            let hosts = self.hosts("subsystem", &stored.name, &mut stored.hosts, &None);
            self.subsystems.push(SubsystemRecord {
                name: stored.name,
                nqn: identity.nqn,
                serial: identity.serial,
                runtime: true,
                hosts,
                configured_hosts: None,
            });
        }
        for (index, subsystem) in self.subsystems.iter().enumerate() {
            let twin = self.subsystems[..index].iter().find(|other| other.nqn == subsystem.nqn);
            if let Some(twin) = twin {
                bail!(
                    "subsystems {:?} and {:?} share the NQN {}; choose another",
                    twin.name,
                    subsystem.name,
                    subsystem.nqn
                );
            }
        }
        Ok(())
    }

    fn volumes(&mut self, config: &Config, state: &mut State) -> anyhow::Result<()> {
        for configured in &config.volumes {
            // IDs the operator chose are kept free of the others.
            let reserved: Vec<u32> = config
                .volumes
                .iter()
                .filter(|other| other.subsystem == configured.subsystem)
                .filter(|other| other.name != configured.name)
                .filter_map(|other| other.nsid)
                .collect();
            let (nsid, identity) = state
                .volume_in(&configured.subsystem, &configured.name, configured.nsid, &reserved)
                .with_context(|| format!("volume {:?}", configured.name))?;
            let spec = configured.spec.to_string();
            let mut record = VolumeRecord {
                name: configured.name.clone(),
                spec: configured.spec.clone(),
                subsystem: configured.subsystem.clone(),
                nsid,
                identity,
                runtime: false,
                wanted: true,
                ana_group: configured.ana_group,
                configured_group: configured.ana_group,
                hosts: configured.hosts.clone(),
                configured_hosts: configured.hosts.clone(),
                write_protect: false,
            };
            let stored = state.stored_mut().volumes.iter_mut();
            if let Some(stored) = stored.into_iter().find(|v| v.name == configured.name) {
                if let Some(attached) = &stored.attached {
                    if *attached != spec {
                        bail!(
                            "volume {:?} was attached at run time as {attached} and the \
                             configuration says {spec}; detach it first, or choose another name",
                            configured.name
                        );
                    }
                    stored.attached = None;
                }
                if let Some(detached) = &stored.detached {
                    record.wanted = *detached != spec;
                    if record.wanted {
                        stored.detached = None;
                    } else {
                        self.notices.push(format!(
                            "volume {:?} of the configuration was detached at run time and stays \
                             so; `penstock volume attach {}` brings it back",
                            configured.name, configured.name
                        ));
                    }
                }
                let group = Change::resolve(&mut stored.ana_group, &configured.ana_group);
                record.ana_group = group.0;
                if group.1 {
                    self.overtaken("the ANA group of volume", &record.name);
                }
                record.hosts =
                    self.hosts("volume", &stored.name, &mut stored.hosts, &configured.hosts);
                record.write_protect = stored.write_protect;
            }
            self.volumes.push(record);
        }

        let attached: Vec<_> =
            state.stored().volumes.iter().filter(|v| v.attached.is_some()).cloned().collect();
        for mut stored in attached {
            let text = stored.attached.take().unwrap_or_default();
            let spec = text.parse().with_context(|| format!("volume {:?}", stored.name))?;
            let there = self.subsystems.iter().any(|s| s.name == stored.subsystem);
            if !there {
                bail!(
                    "volume {:?} was attached at run time to subsystem {:?}, which is no longer in \
                     the configuration; put it back",
                    stored.name,
                    stored.subsystem
                );
            }
            let (nsid, identity) = state.volume_in(&stored.subsystem, &stored.name, None, &[])?;
            let hosts = self.hosts("volume", &stored.name, &mut stored.hosts, &None);
            self.volumes.push(VolumeRecord {
                name: stored.name,
                spec,
                subsystem: stored.subsystem,
                nsid,
                identity,
                runtime: true,
                wanted: true,
                ana_group: Change::resolve(&mut stored.ana_group, &1).0,
                configured_group: 1,
                hosts,
                configured_hosts: None,
                write_protect: stored.write_protect,
            });
        }
        Ok(())
    }

    fn referrals(&mut self, target: &TargetConfig, state: &mut State) -> anyhow::Result<()> {
        if state.stored().referrals.is_none() {
            self.referrals = target.referrals.clone();
            return Ok(());
        }
        let configured = stored_referrals(&target.referrals);
        let (referrals, is_overtaken) =
            Change::resolve(&mut state.stored_mut().referrals, &configured);
        if is_overtaken {
            self.overtaken("the list of", "referrals");
        }
        for referral in referrals {
            let parsed = parse_referral(&referral.addr, Some(&referral.nqn));
            self.referrals.push(parsed.context("a referral in state.toml")?);
        }
        Ok(())
    }

    fn hosts(
        &mut self,
        what: &str,
        name: &str,
        change: &mut Option<Change<Hosts>>,
        configured: &Option<Vec<Nqn>>,
    ) -> Option<Vec<Nqn>> {
        let (hosts, is_overtaken) = Change::resolve(change, &Hosts::of(configured.as_deref()));
        if is_overtaken {
            self.overtaken(&format!("the hosts of {what}"), name);
        }
        // Lists are checked when the file is read; should one slip through, nobody is let in.
        hosts.nqns().unwrap_or(Some(Vec::new()))
    }

    fn overtaken(&mut self, what: &str, name: &str) {
        self.notices.push(format!(
            "{what} {name:?} was changed at run time, and the configuration has been edited since: \
             the configuration holds"
        ));
    }
}

/// Referrals as they are stored.
pub(crate) fn stored_referrals(referrals: &[ReferralConfig]) -> Vec<StoredReferral> {
    let stored = |referral: &ReferralConfig| StoredReferral {
        addr: referral.addr.to_string(),
        nqn: referral.nqn.to_string(),
    };
    referrals.iter().map(stored).collect()
}
