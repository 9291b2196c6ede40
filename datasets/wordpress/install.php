<?php
// Sets the blog up as its web form would, without sending mail.
$_SERVER['HTTP_HOST'] = '127.0.0.1';
define('WP_INSTALLING', true);
require '/usr/share/wordpress/wp-load.php';
require ABSPATH . 'wp-admin/includes/upgrade.php';
function wp_new_blog_notification($title, $url, $user, $password) {}
wp_install('obdlab', 'admin', 'admin@example.org', true, '', 'wordpress');
