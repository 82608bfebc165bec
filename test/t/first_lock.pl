# The first lock of a call is asked for like all others: not for longer than
# lock_timeout at a time, and again after a pause.  And two sessions that fill
# the lab do not both fill it.

use strict;
use warnings;

use IPC::Run qw(start);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('first_lock');
$node->init;
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION risky_migrations');
$node->safe_psql('postgres', "CALL rm_migrate('0001')");

# a psql in the background; ends by itself
sub begin_psql
{
	my ($sql) = @_;
	return start(
		[ 'psql', '-X', '-q', '-d', $node->connstr('postgres'), '-c', $sql ],
		'<', \undef, '>', \my $out, '2>', \my $err);
}

sub wait_for_lock
{
	$node->poll_query_until('postgres',
		"SELECT count(*) > 0 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted
			AND relation = 'large_record'::regclass") or die 'nobody locks the table';
}

for my $call ("CALL rm_migrate('0003')", "CALL rm_migrate('0001')", "CALL rm_migrate('0002')",
	"CALL rm_migrate('0001')",
	"CALL rm_add_column('large_record', 'created_at', 'timestamp', 'created_at::timestamp')")
{
	my $other = begin_psql('BEGIN; LOCK TABLE large_record; SELECT pg_sleep(1.2); COMMIT');
	wait_for_lock();
	my ($status, undef, $err) = $node->psql('postgres', $call);
	is($status, 0, "$call comes through when the table is free again") or diag($err);
	$other->finish;
}

# with the tries used up, one clear error
$node->safe_psql('postgres', 'CALL rm_rollback()');
my $other = begin_psql('BEGIN; LOCK TABLE large_record; SELECT pg_sleep(60)');
wait_for_lock();
my ($status, undef, $err) = $node->psql('postgres',
	"SET risky_migrations.lock_retries = 1; SET risky_migrations.lock_timeout = 50; CALL rm_migrate('0003')");
isnt($status, 0, 'gives up in the end');
like($err, qr/ERROR: .*lock timeout.*DETAIL: .*2 tries.*HINT: .*rm_blocked_queries/s, 'and says so');
$node->safe_psql('postgres',
	"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()");
$other->finish;
is($node->safe_psql('postgres', "SELECT count(*) FROM rm_migrations WHERE state = 'open'"), '0',
	'nothing is left open');

# the second one to fill the lab is told
my $seeding = begin_psql('BEGIN; SELECT rm_seed(1000); SELECT pg_sleep(60)');
$node->poll_query_until('postgres', 'SELECT count(*) = 1 FROM pg_locks WHERE objsubid = 6')
	or die 'nobody seeds';
($status, undef, $err) = $node->psql('postgres', '\set VERBOSITY verbose
SELECT rm_seed(500)');
like($err, qr/55006: the lab in schema "public" is being seeded/, 'a second rm_seed is refused');
$node->safe_psql('postgres',
	"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()");
$seeding->finish;
is($node->safe_psql('postgres', 'SELECT rm_seed(500)'), '500', 'and not when the first has ended');
is($node->safe_psql('postgres', 'SELECT count(*) FROM large_record'), '500', 'the rows are there once');

$node->stop;
done_testing();
