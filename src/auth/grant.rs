//! What whoever shows a credential may do.

use std::net::IpAddr;
use std::sync::Arc;

use crate::config::KeySpec;
use crate::names::NameList;
use crate::networks::AddressRules;
use crate::refusal::Refusal;

/// What a client may do, and who it is. One for each key; one for all who need none.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Names the key in logs and in the ledger.
    pub key_id: Arc<str>,
    /// Who has it.
    pub name: Arc<str>,
    /// Whether it may see what concerns all, and change the gateway.
    pub is_admin: bool,
    /// What its operator noted.
    pub labels: Arc<[(String, String)]>,
    /// Tokens of a month that are paid for already.
    pub reserved_tokens: u64,
    is_enabled: bool,
    expires: Option<i64>,
    /// Under which id it has limits of its own.
    pub limits_of: Arc<str>,
    models: Option<NameList>,
    /// Of those, which ones a token names.
    narrowed: Option<NameList>,
    services: Option<NameList>,
    addresses: AddressRules,
}

/// What a request asks for: a model of a service, by its own name and as the client called it.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// The service.
    pub service: &'a str,
    /// The model's own name; none: something of the service that belongs to no model.
    pub model: Option<&'a str>,
    /// What the client calls it.
    pub asked: Option<&'a str>,
}

impl Grant {
    /// Of a key.
    #[must_use]
    pub fn of_key(key: &KeySpec) -> Self {
        Self {
            key_id: Arc::clone(&key.id),
            name: Arc::clone(&key.name),
            is_admin: key.is_admin,
            labels: Arc::clone(&key.labels),
            reserved_tokens: key.reserved_tokens,
            is_enabled: key.enabled,
            expires: key.expires,
            limits_of: Arc::clone(&key.id),
            models: key.models.clone(),
            narrowed: None,
            services: key.services.clone(),
            addresses: key.addresses.clone(),
        }
    }

    /// Of everybody, where no key is asked for.
    #[must_use]
    pub fn of_everybody() -> Self {
        Self {
            key_id: "".into(),
            name: "anonymous".into(),
            is_admin: true,
            labels: Arc::default(),
            reserved_tokens: 0,
            is_enabled: true,
            expires: None,
            limits_of: "".into(),
            models: None,
            narrowed: None,
            services: None,
            addresses: AddressRules::default(),
        }
    }

    /// From now on it is for some of its models only.
    pub(super) fn narrow(&mut self, models: NameList) {
        self.narrowed = Some(models);
    }

    /// Whether it is good from this address, `now` seconds after 1970.
    ///
    /// # Errors
    /// Why it is not.
    pub fn check(&self, address: Option<IpAddr>, now: i64) -> Result<(), Refusal> {
        if !self.is_enabled {
            return Err(Refusal::KeyDisabled);
        }
        if self.expires.is_some_and(|end| now >= end) {
            return Err(Refusal::KeyExpired);
        }
        if !self.addresses.permit(address) {
            return Err(Refusal::AddressDenied);
        }
        Ok(())
    }

    /// Whether not every model may be asked: then a request's body may not name another one either.
    #[must_use]
    pub fn is_restricted(&self) -> bool {
        self.models.is_some() || self.narrowed.is_some()
    }

    /// Whether it may have this. A model may be listed by its own name, as `service/model`, or as the client
    /// calls it; what belongs to no model, as `service/*`.
    #[must_use]
    pub fn may_have(&self, wish: Wish<'_>) -> bool {
        let Wish { service, model, asked } = wish;
        if self.services.as_ref().is_some_and(|services| !services.holds(service)) {
            return false;
        }
        [&self.models, &self.narrowed].into_iter().flatten().all(|models| {
            let Some(model) = model else { return models.holds(&format!("{service}/*")) };
            models.holds(model)
                || asked.is_some_and(|asked| models.holds(asked))
                || models.holds(&format!("{service}/{model}"))
        })
    }

    /// Whether it may be told that there is no model of this name.
    #[must_use]
    pub fn may_know(&self, name: &str) -> bool {
        let is_listed = |models: &NameList| models.holds(name);
        let mut lists = [&self.models, &self.narrowed].into_iter().flatten();
        self.services.is_none() && lists.all(is_listed)
    }

    /// Whether everything of a service may be had, be it there or not.
    #[must_use]
    pub fn has_all_of(&self, service: &str) -> bool {
        self.may_have(Wish { service, model: None, asked: None })
    }

    /// Whether a body may name this model.
    #[must_use]
    pub fn may_name(&self, service: &str, name: &str) -> bool {
        self.may_have(Wish { service, model: Some(name), asked: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::Networks;

    fn grant(models: Option<&[&str]>, services: Option<&[&str]>) -> Grant {
        let list = |names: &[&str]| NameList::new(names.iter().copied());
        Grant { models: models.map(list), services: services.map(list), ..Grant::of_everybody() }
    }

    fn may(grant: &Grant, service: &str, model: Option<&str>, asked: Option<&str>) -> bool {
        grant.may_have(Wish { service, model, asked })
    }

    #[test]
    fn a_model_is_allowed_by_each_of_its_names() {
        for name in ["gemma", "google/gemma", "google/*", "gem*", "gpt-4o", "*"] {
            let grant = grant(Some(&["x", name]), None);
            assert!(may(&grant, "google", Some("gemma"), Some("gpt-4o")), "{name}");
        }
        for name in ["gemma-2", "openai/gemma", "gpt", ""] {
            let grant = grant(Some(&[name]), None);
            assert!(!may(&grant, "google", Some("gemma"), Some("gpt-4o")), "{name}");
        }
    }

    #[test]
    fn a_list_of_services_goes_with_the_list_of_models() {
        let both = grant(Some(&["gemma"]), Some(&["google"]));
        assert!(may(&both, "google", Some("gemma"), None));
        assert!(!may(&both, "openai", Some("gemma"), None));
        assert!(!may(&both, "google", Some("other"), None));
        assert!(may(&grant(None, Some(&["goo*"])), "google", Some("any"), None));
    }

    #[test]
    fn what_belongs_to_no_model_takes_the_whole_service() {
        assert!(!may(&grant(Some(&["gemma"]), None), "google", None, None));
        assert!(may(&grant(Some(&["google/*"]), None), "google", None, None));
        assert!(may(&grant(None, Some(&["google"])), "google", None, None));
        // A pool whose own name has a wildcard is allowed only by what covers all of it.
        assert!(!may(&grant(Some(&["gpt-4*"]), None), "openai", Some("gpt-*"), Some("gpt-3.5")));
    }

    #[test]
    fn a_key_is_good_until_its_end_and_from_its_addresses() {
        let networks = Networks::new(&["10.0.0.0/8".parse().unwrap()]);
        let key = Grant {
            expires: Some(100),
            addresses: AddressRules { allow: Some(networks), ..AddressRules::default() },
            ..Grant::of_everybody()
        };
        let inside = Some("10.1.2.3".parse().unwrap());
        assert_eq!(key.check(inside, 99), Ok(()));
        assert_eq!(key.check(inside, 100), Err(Refusal::KeyExpired));
        for address in [None, Some("11.0.0.1".parse().unwrap())] {
            assert_eq!(key.check(address, 99), Err(Refusal::AddressDenied));
        }
        let disabled = Grant { is_enabled: false, ..key };
        assert_eq!(disabled.check(inside, 99), Err(Refusal::KeyDisabled));
    }
}
