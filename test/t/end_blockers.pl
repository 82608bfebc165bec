# Whoever is in the way of a lock is ended only on request, only where the role
# may do it, and never if he is a superuser.

use strict;
use warnings;

use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = LabNode->new('end_blockers');
$node->init;
$node->append_conf('postgresql.conf', q{
client_min_messages = notice
risky_migrations.lock_timeout = 20
risky_migrations.lock_retry_max_delay = 20
risky_migrations.lock_retries = 15
});
$node->start;
$node->safe_psql('postgres', q{
CREATE EXTENSION risky_migrations;
CREATE ROLE keeper LOGIN;
CREATE ROLE reader LOGIN;
CREATE ROLE member LOGIN;
GRANT member TO keeper;
CREATE SCHEMA it AUTHORIZATION keeper;
SET ROLE keeper;
CREATE TABLE it.t (id int PRIMARY KEY, v text);
INSERT INTO it.t SELECT g, g FROM generate_series(1, 100) g;
GRANT USAGE ON SCHEMA it TO PUBLIC;
GRANT SELECT ON it.t TO PUBLIC;
});

# A session of that role that keeps the table locked by having read it.
sub reads
{
	my ($role) = @_;
	my $session = $node->background_psql('postgres', extra_params => [ '-U', $role ], on_error_stop => 0);
	$session->query_safe('BEGIN; SELECT count(*) FROM it.t');
	return $session;
}

# The call as the owner, with those settings: what it says.
sub call
{
	my ($settings) = @_;
	my ($code, $out, $err) = $node->psql('postgres',
		"$settings CALL rm_add_column('it.t', 'v', 'int', 'v::int')", extra_params => [ '-U', 'keeper' ]);
	return ($code, $err);
}

sub alive
{
	my ($role) = @_;
	return $node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE usename = '$role' AND state = 'idle in transaction'");
}

my $on = q{SET risky_migrations.end_blockers_after = '50 ms';};
foreach my $case (
	[ 'member', '', 0, 'nobody asked for it' ],
	[ 'reader', $on, 0, 'the role may not end his session' ],
	[ 'postgres', $on, 0, 'a superuser' ],
	[ 'member', $on, 1, 'asked for, and allowed' ])
{
	my ($role, $settings, $ended, $name) = @$case;
	$role = $node->safe_psql('postgres', 'SELECT current_user') if $role eq 'postgres';
	my $session = reads($role);
	my $offset = -s $node->logfile;
	my ($code, $err) = call($settings);
	if ($ended)
	{
		is($code, 0, "$name: the step gets its lock") or diag $err;
		like($err, qr/process \d+ of role "$role" was ended/, "$name: it says so");
		like(slurp_file($node->logfile, $offset), qr/LOG:  migration \d+ has ended process \d+ of role "$role"/, "$name: so does the log");
		is(alive($role), 0, "$name: the session is gone");
		eval { $session->quit };
	}
	else
	{
		isnt($code, 0, "$name: the step gives up");
		like($err, qr/could not get its lock/, "$name: and says why");
		is(alive($role), 1, "$name: the session is there");
		$session->query_safe('COMMIT');
		$session->quit;
	}
}

$node->stop;
done_testing();
