//! Owns whose a request is, how urgent it is and what it shares with others: tenant, class, salt,
//! samples. From the wire to what the engine knows. Believes what clients say: there are no keys.

use slipstream_proto::v1;
use tonic::metadata::MetadataMap;

use crate::engine::request::{PrefixReuse, Priority};
use crate::grpc::limits;
use crate::grpc::refusal::Refusal;
use crate::grpc::validate::over_limit;

/// Name of the tenant in metadata, for gateways.
const TENANT: &str = "x-tenant-id";

/// The tenant that the metadata of a call names.
///
/// # Errors
/// [`Refusal`] for what cannot be a name, and for several: whoever comes first would win.
pub(crate) fn tenant_of(metadata: &MetadataMap) -> Result<Option<String>, Refusal> {
    let mut given = metadata.get_all(TENANT).iter();
    let (first, second) = (given.next(), given.next());
    if second.is_some() {
        return Err(Refusal::argument(TENANT, "must be given at most once"));
    }
    // Bytes that are no text are refused like text that is not visible.
    let Some(name) = first.map(|value| value.to_str().unwrap_or(" ")) else { return Ok(None) };
    Ok(Some(check_tenant(TENANT, name)?.to_owned()))
}

/// The name, if it is one. The empty one is that of everybody who gives none.
///
/// # Errors
/// [`Refusal`] naming `field` and the limit.
pub(crate) fn check_tenant<'a>(field: &str, name: &'a str) -> Result<&'a str, Refusal> {
    let is_visible = name.bytes().all(|byte| byte.is_ascii_graphic());
    if name.len() <= limits::TENANT_BYTES_MAX && is_visible {
        return Ok(name);
    }
    let limit = limits::TENANT_BYTES_MAX;
    let problem =
        format!("must be 0 to {limit} visible ASCII characters, got {} bytes", name.len());
    Err(Refusal::argument(field, problem))
}

/// How urgent a request is.
///
/// # Errors
/// [`Refusal`] for a number that is no class.
pub(crate) fn priority(given: i32) -> Result<Priority, Refusal> {
    match v1::Priority::try_from(given) {
        Ok(v1::Priority::Interactive) => Ok(Priority::Interactive),
        Ok(v1::Priority::Unspecified | v1::Priority::Normal) => Ok(Priority::Normal),
        Ok(v1::Priority::Batch) => Ok(Priority::Batch),
        Err(_) => Err(Refusal::argument("priority", format!("{given} is not a priority"))),
    }
}

/// Among which requests of the tenant KV is shared.
///
/// # Errors
/// [`Refusal`] for a salt that is too long, even where it does not matter.
pub(crate) fn prefix_reuse(wire: &v1::GenerateRequest) -> Result<PrefixReuse, Refusal> {
    let salt = &wire.cache_salt;
    if salt.len() > limits::CACHE_SALT_BYTES_MAX {
        let problem = over_limit(salt.len(), limits::CACHE_SALT_BYTES_MAX, "bytes");
        return Err(Refusal::argument("cache_salt", problem));
    }
    Ok(if wire.no_prefix_reuse { PrefixReuse::Off } else { PrefixReuse::salted(salt) })
}

/// How many samples are asked for, at least 1.
///
/// # Errors
/// [`Refusal`] for a number out of bounds, for indices past the last, and for a prefix, which is
/// the output of one sample.
pub(crate) fn num_samples(wire: &v1::GenerateRequest) -> Result<u32, Refusal> {
    let given = wire.n.unwrap_or(1);
    let within = u32::try_from(given).ok().filter(|&num| {
        let num = usize::try_from(num).unwrap_or(usize::MAX);
        (1..=limits::SAMPLES_MAX).contains(&num)
    });
    let Some(num) = within else {
        let problem = format!("must be from 1 to {}, got {given}", limits::SAMPLES_MAX);
        return Err(Refusal::argument("n", problem));
    };
    if wire.sample_index.checked_add(num - 1).is_none() {
        let last = u32::MAX - (num - 1);
        let problem = format!("must be at most {last} with n = {num}, got {}", wire.sample_index);
        return Err(Refusal::argument("sample_index", problem));
    }
    if num > 1 && !wire.output_prefix.is_empty() {
        let problem = format!("is output of one sample, n is {num}: go on with them one by one");
        return Err(Refusal::argument("output_prefix", problem));
    }
    Ok(num)
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataMap;

    use super::{TENANT, num_samples, tenant_of, v1};

    fn metadata(names: &[&str]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for name in names {
            metadata.append(TENANT, name.parse().expect("a header's value"));
        }
        metadata
    }

    #[test]
    fn a_call_has_one_tenant_or_none() {
        let longest = "t".repeat(64);
        assert_eq!(tenant_of(&metadata(&[])), Ok(None));
        for name in ["", "a", "Team/1_~!", &longest] {
            assert_eq!(tenant_of(&metadata(&[name])), Ok(Some(name.to_owned())));
        }
        let too_long = "t".repeat(65);
        for names in [&["a", "a"][..], &["a b"], &["a\tb"], &[&too_long]] {
            let refusal = tenant_of(&metadata(names)).expect_err("no tenant");
            assert!(refusal.to_string().starts_with("x-tenant-id:"), "{refusal}");
        }
        let bytes = b"\xff".as_slice().try_into().expect("a header's value");
        let mut metadata = MetadataMap::new();
        metadata.insert(TENANT, bytes);
        assert!(tenant_of(&metadata).is_err(), "no text");
    }

    #[test]
    fn the_last_sample_has_an_index_too() {
        let asked = |n, sample_index| {
            num_samples(&v1::GenerateRequest { n, sample_index, ..Default::default() })
        };
        assert_eq!([asked(None, 0), asked(Some(1), u32::MAX)], [Ok(1), Ok(1)]);
        assert_eq!(asked(Some(16), u32::MAX - 15), Ok(16));
        for (n, sample_index, field) in [
            (Some(16), u32::MAX - 14, "sample_index"),
            (Some(0), 0, "n"),
            (Some(-1), 0, "n"),
            (Some(i32::MIN), 0, "n"),
            (Some(17), 0, "n"),
            (Some(i32::MAX), u32::MAX, "n"),
        ] {
            let refusal = asked(n, sample_index).expect_err(field).to_string();
            assert!(refusal.starts_with(&format!("{field}: ")), "{refusal}");
        }
    }
}
