//! Whether a client may have what it asks for: by its key, and from where it comes.

use std::net::IpAddr;
use std::sync::Arc;

use crate::auth::{Grant, Wish};
use crate::refusal::Refusal;
use crate::runtime::{Target, Way};

/// What a client may have of a way.
pub(super) struct Rights {
    pub(super) grant: Arc<Grant>,
    pub(super) address: Option<IpAddr>,
    /// Whether it asks for a model, and not for something that belongs to none.
    pub(super) is_for_model: bool,
}

impl Rights {
    /// Whether it may be served by this one, when it calls the model so.
    pub(super) fn permit(&self, target: &Target, asked: Option<&str>) -> bool {
        target.addresses.permit(self.address) && self.is_granted(target, asked)
    }

    fn is_granted(&self, target: &Target, asked: Option<&str>) -> bool {
        let (service, model) = target.names();
        // The name that was asked for says nothing of what stands in for it.
        let asked = asked.filter(|_| !target.is_fallback);
        let model = self.is_for_model.then_some(model);
        self.grant.may_have(Wish { service, model, asked })
    }

    /// The first of a way's targets that may serve it.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn first(&self, way: &Way, asked: Option<&str>) -> Result<usize, Refusal> {
        if let Some(at) = way.targets.iter().position(|target| self.permit(target, asked)) {
            return Ok(at);
        }
        if way.targets.iter().any(|target| self.is_granted(target, asked)) {
            return Err(Refusal::AddressDenied);
        }
        Err(match asked.filter(|_| self.is_for_model) {
            Some(asked) => Refusal::ModelDenied { model: asked.to_owned() },
            // The same words as where there is nothing.
            None => Refusal::NotAllowed,
        })
    }

    /// What a client is told whom a refusal would tell which models there are that are not for it.
    pub(super) fn hide(grant: &Grant, refusal: Refusal) -> Refusal {
        match refusal {
            Refusal::ModelUnknown { model } if !grant.may_know(&model) => {
                Refusal::ModelDenied { model }
            }
            Refusal::NoService { service } | Refusal::NoModel { service, .. }
                if !grant.has_all_of(&service) =>
            {
                Refusal::NotAllowed
            }
            other => other,
        }
    }

    /// Whether a request on this way may name a model besides the one that its way is by. Where every backend is
    /// told another name in its place, it says nothing.
    ///
    /// # Errors
    /// When the key is not for that one.
    pub(super) fn check_name(&self, way: &Way, name: &str) -> Result<(), Refusal> {
        let may_name =
            |target: &Target| target.forces_name || self.grant.may_name(target.names().0, name);
        if !self.grant.is_restricted() || way.targets.iter().all(may_name) {
            return Ok(());
        }
        Err(Refusal::ModelDenied { model: name.to_owned() })
    }

    /// Whether the body has to be looked into for a model that the client may not have.
    pub(super) fn needs_name(&self, way: Option<&Way>) -> bool {
        let is_forced = |way: &Way| way.targets.iter().all(|target| target.forces_name);
        self.grant.is_restricted() && !way.is_some_and(is_forced)
    }
}
